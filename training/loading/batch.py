"""One micro-batch as a recipe gets it."""

from dataclasses import dataclass

import torch

from training.randomness import SampleIdentity


@dataclass(frozen=True)
class Batch:
    """One micro-batch, ready for a model. B samples of one bucket, in the plan's order."""

    step: int
    """Number of the step in the plan."""
    number: int
    """Number of the micro-batch in the step; past its end for padding."""
    is_padding: bool
    """Real data run only to keep ranks in step: all loss weights are 0, `broken` is empty, count nothing of it."""
    images: torch.Tensor
    """(B, 3, H, W) uint8, sRGB."""
    captions: list[str]
    identities: list[SampleIdentity]
    loss_weights: torch.Tensor
    """(B,) float32; 0 for a broken sample and for padding."""
    is_broken: torch.Tensor
    """(B,) bool; such a slot holds mid-grey pixels."""
    broken: list[tuple[str, str]]
    """(key, reason) of the broken samples."""
    datasets: list[str]
    original_sizes: list[tuple[int, int]]
    """(width, height) as stored, before resizing."""
    crops: list[tuple[int, int]]
    """(left, top) of the crop, in pixels of the resized image."""
    masks: torch.Tensor | None = None
    """(B, 1, H, W) uint8: 255 counts fully, 0 not at all; a sample without a mask has 255. None when none has one."""

    def mask_at(self, height: int, width: int) -> torch.Tensor | None:
        """Return masks as weights in 0 … 1 at a latent's size, (B, 1, height, width) float32: the mean over each cell.

        None when no sample has a mask. Raises ValueError when the latent's cells are not whole pixels.
        """
        if self.masks is None:
            return None
        size, (pixel_height, pixel_width) = len(self.masks), self.masks.shape[2:]
        if pixel_height % height or pixel_width % width:
            raise ValueError(
                f"masks of {pixel_width}x{pixel_height} pixels cannot be averaged to {width}x{height}: "
                "sides must divide; correct buckets.step"
            )
        cells = self.masks.view(size, 1, height, pixel_height // height, width, pixel_width // width)
        return cells.float().mean(dim=(3, 5)) / 255
