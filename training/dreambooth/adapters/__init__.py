"""Adapters and trained tokens of Stable Diffusion 1, 2 and XL: on its layers, in files, merged, extracted."""
