"""What a model says about an image, and the text made of it. torch only inside model plug-ins."""
