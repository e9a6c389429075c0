"""Stable Diffusion's noise: schedule, targets, weights, and the shapes noise can be given."""
