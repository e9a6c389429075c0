"""Pictures drawn by a Stable Diffusion model in hand: previews and class images."""
