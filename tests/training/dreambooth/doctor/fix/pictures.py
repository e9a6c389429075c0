"""Pictures for these tests."""

import numpy as np
from PIL import Image


def painting(width=300, height=400, seed=0):
    """Coarse coloured blocks: every place is different, no side looks like a bar."""
    rng = np.random.default_rng(seed)
    blocks = Image.fromarray(rng.integers(0, 255, (height // 20, width // 20, 3), np.uint8))
    return blocks.resize((width, height), Image.Resampling.BICUBIC)
