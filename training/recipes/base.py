"""What a recipe must offer to the loop. A Protocol, not a base class: recipes share no code by inheritance."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from training.chunk_data import Batch
from training.config import Prompt, RunConfig


@dataclass(frozen=True)
class Loss:
    """Losses of one micro-batch, one number per sample, fp32, on the device."""

    per_sample: Tensor
    """(B,) unweighted, with gradient."""
    weights: Tensor
    """(B,) the recipe's own weights (P2, adaptive, …), without gradient."""
    scalars: Mapping[str, Tensor] = field(default_factory=dict)
    """(B,) values to record per sample, for example `logsnr`; `timestep`, in [0, 1], is charted by band."""
    broken: Mapping[int, str] = field(default_factory=dict)
    """Slots that turned out to be unusable, with the reason: they are counted with the images that cannot be read, and
    their losses, whatever they are, are not used."""


@dataclass(frozen=True)
class SampleResult:
    """What became of one planned sample in a step; gathered from all ranks in plan order."""

    key: str
    dataset: str
    caption: str
    """As it was trained: shuffled, cut, dropped."""
    loss: float
    """Unweighted."""
    weighted_loss: float
    scalars: Mapping[str, float]


@dataclass(frozen=True)
class ExportFile:
    """One exported file or folder, with how many values changed beyond rounding when cast."""

    path: Path
    num_overflowed: int = 0
    num_vanished: int = 0

    def __str__(self) -> str:
        return f"{self.path}  ({self.num_overflowed:,} values overflowed, {self.num_vanished:,} vanished)"


class Recipe(Protocol):
    """One thing to train. Made on every rank; talks to no other rank and no file but those of its weights."""

    def load(self, device: torch.device) -> None:
        """Load networks and put them on `device`; trained weights in fp32."""

    def trainable(self) -> nn.Module:
        """Return the ONE module that holds every trained parameter; its forward is what `loss` calls."""

    def parts(self) -> dict[str, Iterable[nn.Parameter]]:
        """Return trained parameters by part: each part has its own learning rate."""

    def learning_rates(self) -> dict[str, float]:
        """Return the peak learning rate of each part."""

    def frozen_digests(self) -> dict[str, str]:
        """Return a SHA-256 of each thing that decides what is trained but is in no state, by its config key."""

    def loss(self, model: nn.Module, batch: Batch, *, timesteps: Sequence[float] | None = None) -> Loss:
        """Return the losses of a micro-batch, calling the prepared `model`, with counted randomness only.

        timesteps: one per sample, from 0 (picture) to 1 (noise), in place of counted ones; validation gives them.
        """

    def after_step(self, results: Sequence[SampleResult]) -> None:
        """Update loss tables from the whole step's samples, the same on all ranks."""

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the recipe's own state (loss tables); empty when it has none."""

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_tensors` gave."""

    def preview(self, prompts: Sequence[Prompt]) -> list[Image.Image]:
        """Make one picture per prompt in eval mode, and leave the training mode as it was."""

    def export(
        self,
        folder: Path,
        *,
        dtype: torch.dtype,
        metadata: Mapping[str, str],
        weights: Mapping[str, Tensor] | None = None,
    ) -> list[ExportFile]:
        """Write weights that other programs load. weights: of `trainable` by name, where it holds no whole ones."""


def load_recipe(config: RunConfig) -> Recipe:
    """Return the recipe that the run's config names, not yet loaded."""
    if config.recipe_name == "dreambooth":
        from training.recipes.dreambooth import DreamBooth

        return DreamBooth(config)
    from training.recipes.stage_c import StageC

    return StageC(config)
