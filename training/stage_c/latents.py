"""Pixels of a batch → stage C latents, and which of them cannot be trained. Or latents that were encoded ahead."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from training.chunk_data import Batch
from training.config.stage_c import StageCConfig
from training.stage_c.effnet import EffNetEncoder, load_effnet
from training.tensor_file import digest_of_tensors

NOT_FINITE = "its latents are not finite, in fp32 either"


@dataclass(frozen=True)
class Latents:
    """values: (B, 16, H / 32, W / 32) float32, all finite. broken: slot → why its values are zeros."""

    values: Tensor
    broken: Mapping[int, str] = field(default_factory=dict)


class LatentEncoder:
    """The frozen EfficientNet encoder of a run; loaded when it is first asked for."""

    def __init__(self, settings: StageCConfig, *, device: torch.device) -> None:
        self._device = device
        self._path = Path(settings.effnet)
        self._compute = torch.bfloat16 if settings.effnet_dtype == "bf16" else torch.float32

    @cached_property
    def effnet(self) -> EffNetEncoder:
        """The network. Raises FileNotFoundError, WeightsError."""
        return load_effnet(self._path, device=self._device).requires_grad_(False)

    def load(self) -> None:
        """Load the network now. Raises FileNotFoundError, WeightsError."""
        assert self.effnet is not None

    def digests(self) -> dict[str, str]:
        """Return a SHA-256 of the weights, by config key."""
        return {"stage_c.effnet": digest_of_tensors(self.effnet.state_dict())}

    def of(self, batch: Batch) -> Latents:
        """Return the latents of a batch; those encoded ahead as they are stored."""
        if batch.latents is not None:
            return Latents(batch.latents.to(self._device, non_blocking=True).float())
        assert batch.images is not None
        return self.encode(batch.images)

    def encode(self, images: Tensor) -> Latents:
        """Return the latents of images (B, 3, H, W) uint8.

        On a CPU each is encoded alone: there the bits depend on a picture's neighbours, and latents made ahead have
        others. Those that bf16 makes not finite are made again in fp32. What is not finite in fp32 either becomes
        zeros, so that the forward pass stays finite, and broken: other trainers go on with the zeros.
        """
        rgb = images.to(self._device, non_blocking=True).float() / 255
        together = 1 if self._device.type == "cpu" else len(rgb)
        values = torch.cat([self.effnet.encode(some, compute=self._compute) for some in torch.split(rgb, together)])
        slots = _not_finite(values)
        if slots and self._compute != torch.float32:
            values[slots] = torch.cat([self.effnet.encode(rgb[slot][None]) for slot in slots])
            slots = _not_finite(values)
        values[slots] = 0
        return Latents(values, dict.fromkeys(slots, NOT_FINITE))


def _not_finite(values: Tensor) -> list[int]:
    slots: list[int] = (~values.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist()
    return slots
