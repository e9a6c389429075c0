"""Pixels of a batch → stage C latents, and which of them cannot be trained."""

from pathlib import Path

import torch
from torch import Tensor

from training.config.stage_c import StageCConfig
from training.stage_c.effnet import load_effnet
from training.tensor_file import digest_of_tensors

NOT_FINITE = "its latents are not finite, in fp32 either"


class LatentEncoder:
    """The frozen EfficientNet encoder of a run."""

    def __init__(self, settings: StageCConfig, *, device: torch.device) -> None:
        self._device = device
        self._compute = torch.bfloat16 if settings.effnet_dtype == "bf16" else torch.float32
        self.effnet = load_effnet(Path(settings.effnet), device=device).requires_grad_(False)

    def digests(self) -> dict[str, str]:
        """Return a SHA-256 of the weights, by config key."""
        return {"stage_c.effnet": digest_of_tensors(self.effnet.state_dict())}

    def encode(self, images: Tensor) -> Tensor:
        """Return latents (B, 16, H / 32, W / 32) float32 of images (B, 3, H, W) uint8.

        Those that bf16 makes not finite are made again in fp32; see `leave_out_not_finite` for what still is not.
        """
        rgb = images.to(self._device, non_blocking=True).float() / 255
        latents = self.effnet.encode(rgb, compute=self._compute)
        if self._compute != torch.float32 and (slots := _not_finite(latents)):
            latents[slots] = self.effnet.encode(rgb[slots])
        return latents


def leave_out_not_finite(latents: Tensor) -> tuple[Tensor, dict[int, str]]:
    """Return latents (B, C, H, W) with zeros for those that are not finite, and the reason by slot.

    Zeros, so that the forward pass stays finite; a loss must not be taken of them.
    """
    slots = _not_finite(latents)
    if slots:
        latents = latents.clone()
        latents[slots] = 0
    return latents, dict.fromkeys(slots, NOT_FINITE)


def _not_finite(latents: Tensor) -> list[int]:
    slots: list[int] = (~latents.isfinite().all(dim=3).all(dim=2).all(dim=1)).nonzero().flatten().tolist()
    return slots
