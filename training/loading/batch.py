"""One micro-batch as a recipe gets it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

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
    images: torch.Tensor | None
    """(B, 3, H, W) uint8, sRGB; None where `latents` come instead."""
    captions: list[str]
    identities: list[SampleIdentity]
    loss_weights: torch.Tensor
    """(B,) float32; 0 for a broken sample and for padding."""
    is_broken: torch.Tensor
    """(B,) bool; such a slot holds mid-grey pixels, or a latent of zeros."""
    broken: list[tuple[str, str]]
    """(key, reason) of the broken samples."""
    datasets: list[str]
    original_sizes: list[tuple[int, int]]
    """(width, height) as stored, before resizing."""
    crops: list[tuple[int, int]]
    """(left, top) of the crop, in pixels of the resized image."""
    latents: torch.Tensor | None = None
    """(B, C, h, w) as encoded ahead, in the format they are stored in."""
    text: tuple[torch.Tensor, ...] | None = None
    """What the text encoder gave for the captions ahead of training, B rows each; None where the recipe encodes."""
    masks: torch.Tensor | None = None
    """(B, 1, H, W) uint8: 255 counts fully, 0 not at all; a sample without a mask has 255. None when none has one."""

    def without(self, broken: Mapping[int, str]) -> "Batch":
        """Return the batch with these slots, slot → reason, broken, too: weight 0, and told unless it is padding."""
        if not broken:
            return self
        slots = [slot for slot in sorted(broken) if not self.is_broken[slot]]
        is_broken, loss_weights = self.is_broken.clone(), self.loss_weights.clone()
        is_broken[slots], loss_weights[slots] = True, 0.0
        told = [] if self.is_padding else [(self.identities[slot].key, broken[slot]) for slot in slots]
        return replace(self, is_broken=is_broken, loss_weights=loss_weights, broken=[*self.broken, *told])

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
