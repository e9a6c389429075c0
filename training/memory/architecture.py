"""What the planner knows of any recipe: networks without weights, a pass through them, and the shapes in them.

Each recipe has a file beside this one that makes them from a run's settings: `stage_c_architecture`, `sd_architecture`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from training.config import RunConfig
from training.lora.frozen_base import frozen_base
from training.memory.device_rules import Device, DeviceRules

Gradients = Literal["kept", "grown", "released"]


@dataclass(frozen=True)
class Pass:
    """A forward and backward pass of one micro-batch on one rank."""

    width: int
    height: int
    """Pixels of the bucket, as the encoder sees them."""
    num_windows: int
    """Token windows of a caption: max_tokens / 75."""
    weights: Literal["fp32", "bf16"] = "fp32"
    autocast: bool = True
    """16-bit compute under fp32 weights: casts of all of them are kept until the backward pass is done with them."""
    checkpointing: bool = True
    gradients: Gradients = "kept"
    """Those of all parameters are there before (accumulation), grow in this pass, or are used up one by one."""
    update_bytes: int = 0
    """`released`: temporaries per element of a parameter, while it is updated."""
    device: Device = "gpu"


class Networks(ABC):
    """Networks of a run in the state that its recipe trains them in, without weights."""

    model: nn.Module
    """What is trained, as one module."""
    frozen: tuple[nn.Module, ...]
    """Networks beside it that are in memory."""
    num_more_frozen: int = 0
    """Parameters of frozen networks that are counted only."""

    @abstractmethod
    def prepare(self, settings: Pass, rules: DeviceRules) -> None:
        """Set up what a pass is to be like. Blocks that are computed again must be so under the rules, too."""

    def encode(self, settings: Pass, num_images: int, rules: DeviceRules) -> Callable[[], None] | None:
        """Return what is done to pixels before anything else of a step, where that may be a step's worst moment."""
        return None

    @abstractmethod
    def step(self, settings: Pass, num_images: int, rules: DeviceRules) -> Callable[[], None]:
        """Return what the recipe's loss and the loop do, without the arithmetic of noise and weights."""


class Architecture(Protocol):
    """Shapes of everything that is in memory while a recipe's run trains."""

    @property
    def assumed(self) -> tuple[str, ...]:
        """What was not found here and is taken for the published model."""

    def key(self) -> str:
        """Return what passes through the networks depend on, besides the shapes of what is trained."""

    def networks(self) -> Networks:
        """Return the networks. Under a meta device they take no memory."""


def architecture_of(config: RunConfig) -> Architecture:
    """Return the architecture of a run. Raises WeightsError or ValueError for a file of another kind."""
    if config.recipe_name == "stage_c":
        from training.memory.stage_c_architecture import stage_c_architecture

        return stage_c_architecture(config)
    from training.memory.sd_architecture import sd_architecture

    return sd_architecture(config)


@dataclass(frozen=True)
class Shapes:
    """What is in memory, whole. beside: saved in states, but without gradient; frozen: neither."""

    trained: Mapping[str, torch.Size]
    beside: Mapping[str, torch.Size]
    num_frozen: int
    frozen_bytes: int


def shapes_of(architecture: Architecture) -> Shapes:
    """Return the shapes of parameters, and the sizes of frozen networks, a base below adapters among them."""
    with torch.device("meta"):
        networks = architecture.networks()
    base = frozen_base(networks.model)
    named = {name: p for name, p in networks.model.named_parameters() if name not in base}
    trained = {name: p.shape for name, p in named.items() if p.requires_grad}
    beside = {name: p.shape for name, p in named.items() if not p.requires_grad}
    below = [p for name, p in networks.model.named_parameters() if name in base]
    frozen = [*below, *(p for module in networks.frozen for p in module.parameters())]
    return Shapes(
        trained, beside, sum(p.numel() for p in frozen) + networks.num_more_frozen,
        sum(p.numel() * p.element_size() for p in frozen) + 4 * networks.num_more_frozen,
    )  # fmt: skip


def recomputed_under(rules: DeviceRules, part: nn.Module) -> None:
    """Let a part of a checkpointed block compute under the rules also when the backward pass calls it again."""
    part.forward = rules.around(part.forward)


def tensors_of(networks: Networks) -> list[Tensor]:
    """Return parameters and buffers of all networks."""
    return [
        tensor for module in (networks.model, *networks.frozen) for tensor in (*module.parameters(), *module.buffers())
    ]
