"""Pixels of a batch → stage C latents."""

from pathlib import Path

import torch
from torch import Tensor

from training.config.stage_c import StageCConfig
from training.stage_c.effnet import load_effnet


class LatentEncoder:
    """The frozen EfficientNet encoder of a run."""

    def __init__(self, settings: StageCConfig, *, device: torch.device) -> None:
        self._device = device
        self.effnet = load_effnet(Path(settings.effnet), device=device).requires_grad_(False)

    def encode(self, images: Tensor) -> Tensor:
        """Return latents (B, 16, H / 32, W / 32) float32 of images (B, 3, H, W) uint8."""
        return self.effnet.encode(images.to(self._device, non_blocking=True).float() / 255)
