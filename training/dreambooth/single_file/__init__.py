"""Stable Diffusion's original single-file layout: names and shapes of each part, reading, writing."""
