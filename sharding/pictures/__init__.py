"""What is made of decoded pixels: hashes, sketches, local features, and upright sRGB itself."""
