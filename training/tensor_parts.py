"""Tensors that lie in parts on several processes: bring one together, and cut one up.

Two kinds are known: torch's distributed tensors (FSDP2), and `InParts`, for engines that keep parts in a form of their
own (DeepSpeed). Nothing here decides when; bringing together is collective, cutting up is not.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class InParts:
    """A tensor that its engine brings together when asked. gather: collective, gives the whole on every rank."""

    shape: torch.Size
    dtype: torch.dtype
    gather: Callable[[], Tensor]

    def numel(self) -> int:
        return self.shape.numel()

    def element_size(self) -> int:
        return self.dtype.itemsize


def whole(tensor: Tensor | InParts) -> Tensor:
    """Return the whole tensor: itself, or all its parts together. Collective where there are parts: every rank asks."""
    if isinstance(tensor, InParts):
        return tensor.gather()
    together = getattr(tensor, "full_tensor", None)
    found: Tensor = tensor if together is None else together()
    return found


def brought_together(tensors: Mapping[str, Tensor | InParts], *, is_kept: bool) -> dict[str, Tensor]:
    """Return whole copies in CPU memory, or nothing on ranks that only give their parts; every rank calls it alike.

    Formats stay; views, shared and 0-d tensors become tensors of their own. One is whole on the device at a time.
    """
    kept = {}
    for name, tensor in tensors.items():
        together = whole(tensor)
        if is_kept:
            kept[name] = torch.empty(together.shape, dtype=together.dtype).copy_(together.detach())
    return kept


def part_of(tensor: Tensor, parameter: Any, *, slot: str = "") -> Tensor:
    """Return a whole tensor as the distributed one that belongs to a distributed parameter; each rank cuts out its own.

    slot: of the optimizer's state, when it is one. One of the parameter's shape is cut as the parameter is; Adafactor's
    rows and columns where they still have the parameter's first dimension; all others stay whole on every rank.
    """
    from torch.distributed.tensor import Replicate, distribute_tensor

    if tensor.ndim == 0:
        return tensor.clone()
    is_cut = tensor.shape == parameter.shape or (slot.endswith("_row") or (slot.endswith("_col") and tensor.ndim > 1))
    placements = parameter.placements if is_cut else [Replicate()] * parameter.device_mesh.ndim
    on_device = tensor.to(parameter.to_local().device)
    part: Tensor = distribute_tensor(on_device, parameter.device_mesh, placements, src_data_rank=None)
    return part
