"""SD DreamBooth: concepts, where they come from, and what is made of them. The recipe is in `training.recipes`."""
