"""Image → tags with probabilities and categories. One file per kind of model."""
