"""One adapter for q, k and v stacked in one weight, or one for each: from either to the other, without a change.

Stacked ones share their down projection. Three that do not are stacked with blocks of zeros, at three times the rank;
`unpacked` sees such blocks and gives the three back as they were.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from training.lora.adapter import DOWN, UP, Adapter, AdapterError


def packed(parts: Sequence[Adapter]) -> Adapter:
    """Return the adapter of the stacked weight of these, in order. Raises AdapterError for other kinds than LoRA."""
    _require_lora(parts)
    first = parts[0]
    downs, ups = [part.tensors[DOWN] for part in parts], [part.tensors[UP] for part in parts]
    if all(torch.equal(down, downs[0]) for down in downs) and {part.alpha for part in parts} == {first.alpha}:
        return Adapter("lora", {DOWN: downs[0], UP: torch.cat(ups)}, first.alpha)
    if len({part.scale for part in parts}) > 1:
        raise AdapterError("adapters of q, k and v with different alpha / rank cannot share one; use the kohya layout")
    rank = sum(down.shape[0] for down in downs)
    blocks: Tensor = torch.block_diag(*ups)  # type: ignore[no-untyped-call]
    return Adapter("lora", {DOWN: torch.cat(downs), UP: blocks}, first.scale * rank)


def unpacked(whole: Adapter, num_parts: int = 3) -> list[Adapter]:
    """Return the adapters of a stacked weight's equal parts. Raises AdapterError for other kinds than LoRA."""
    _require_lora([whole])
    ups, down, rank = whole.tensors[UP].chunk(num_parts), whole.tensors[DOWN], whole.tensors[DOWN].shape[0]
    if rank % num_parts == 0 and _is_block_diagonal(ups, size := rank // num_parts):
        blocks = [slice(number * size, (number + 1) * size) for number in range(num_parts)]
        return [
            Adapter("lora", {DOWN: down[own].contiguous(), UP: up[:, own].contiguous()}, whole.scale * size)
            for up, own in zip(ups, blocks, strict=True)
        ]
    return [Adapter("lora", {DOWN: down, UP: up.contiguous()}, whole.alpha) for up in ups]


def _is_block_diagonal(ups: Sequence[Tensor], size: int) -> bool:
    """Tell whether each part has values in its own columns only, and has some there."""
    for number, up in enumerate(ups):
        own = up[:, number * size : (number + 1) * size]
        if not own.any() or int(up.count_nonzero()) != int(own.count_nonzero()):
            return False
    return True


def _require_lora(parts: Sequence[Adapter]) -> None:
    if wrong := {part.kind for part in parts} - {"lora"}:
        raise AdapterError(f"a {' and '.join(sorted(wrong))} of q, k and v together cannot be written as one of each")
