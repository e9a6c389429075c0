"""Stable Diffusion 1, 2 and XL as modules: from a single file, a diffusers folder or a hub id, without a network."""
