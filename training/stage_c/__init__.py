"""Stable Cascade stage C: network, diffusion, encoders and file formats; the recipe is elsewhere."""
