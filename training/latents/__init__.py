"""Latents and text outputs encoded ahead of training: what is wanted, making it, keeping it, reading it."""
