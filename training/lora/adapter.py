"""One layer's adapter, whatever its kind: its tensors, its alpha, and what it makes of the layer's weight.

Tensors have the names that kohya and LyCORIS give them. No PEFT, no files.

Sources: Hu et al., "LoRA", 2021; Liu et al., "DoRA", 2024; Hyeon-Woo et al., "FedPara" (LoHa), 2022; Yeh et al.,
"Navigating Text-To-Image Customization" (LyCORIS: LoHa, LoKr), 2024.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["lora", "dora", "loha", "lokr"]
DOWN, UP, MAGNITUDE = "lora_down.weight", "lora_up.weight", "dora_scale"
_INNER = ("lokr_w1_b", "lokr_w2_b", "hada_w1_b")
"""Factors whose first dimension is the rank."""
TENSORS: Mapping[Kind, frozenset[str]] = {
    "lora": frozenset({DOWN, UP}),
    "dora": frozenset({DOWN, UP, MAGNITUDE}),
    "loha": frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),
    "lokr": frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"}),
}


class AdapterError(ValueError):
    """An adapter, or a file of adapters, cannot be understood or does not fit."""


@dataclass(frozen=True)
class Adapter:
    """See the module.

    lora_down: (rank, in, …) and lora_up: (out, rank, …), with kernel dimensions for a convolution. dora_scale:
    (out, 1, …), or (1, in, …) in files of LyCORIS. alpha: the change is multiplied by alpha / rank. given_rank: of a
    LoKr of two whole factors, whose tensors do not tell it.
    """

    kind: Kind
    tensors: Mapping[str, Tensor]
    alpha: float
    given_rank: int | None = None

    @property
    def inner_rank(self) -> int | None:
        """The rank that tensors tell; None for a LoKr of two whole factors."""
        if self.kind in ("lora", "dora"):
            return self.tensors[DOWN].shape[0]
        return next((self.tensors[name].shape[0] for name in _INNER if name in self.tensors), None)

    @property
    def rank(self) -> int | None:
        """The inner dimension; None where nothing tells it: such a LoKr is not scaled."""
        return self.inner_rank or self.given_rank

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return 1.0 if self.rank is None else self.alpha / self.rank

    def change(self, shape: torch.Size) -> Tensor:
        """Return the low-rank change of a weight of this shape, in fp32, before DoRA's magnitude."""
        parts = {name: tensor.float() for name, tensor in self.tensors.items()}
        if self.kind in ("lora", "dora"):
            product = parts[UP].flatten(1) @ parts[DOWN].flatten(1)
        elif self.kind == "loha":
            product = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
        else:
            first, second = _factor(parts, "lokr_w1"), _factor(parts, "lokr_w2")
            first = first.reshape(*first.shape, *[1] * (second.ndim - first.ndim))
            product = torch.kron(first, second)
        if product.numel() != shape.numel():
            raise AdapterError(f"makes a change of shape {tuple(product.shape)}; the weight is {tuple(shape)}")
        return product.reshape(shape) * self.scale

    def merged(self, weight: Tensor, *, strength: float = 1.0) -> Tensor:
        """Return the weight with this adapter in it, in fp32. strength: share of the way from `weight` to there."""
        base = weight.float()
        changed = base + self.change(base.shape)
        if self.kind == "dora":
            changed = changed * _magnitudes(self.tensors[MAGNITUDE].float(), changed)
        return changed if strength == 1.0 else base + strength * (changed - base)


def _factor(parts: Mapping[str, Tensor], name: str) -> Tensor:
    return parts[name] if name in parts else parts[f"{name}_a"] @ parts[f"{name}_b"]


def _magnitudes(wanted: Tensor, weight: Tensor) -> Tensor:
    """Return the factor of each output (or, in LyCORIS's files, input) that gives its weights the wanted norm."""
    of_outputs = wanted.shape[0] == weight.shape[0]
    axis = 0 if of_outputs else 1
    found = weight.transpose(0, axis).flatten(1).norm(dim=1)
    ones = [1] * (weight.ndim - 1)
    factors: Tensor = (wanted.reshape(-1) / found).reshape(-1, *ones).transpose(0, axis)
    return factors


def adapter_of(tensors: Mapping[str, Tensor], alpha: float | None, *, layer: str, rank: int | None = None) -> Adapter:
    """Return the adapter whose tensors these are. alpha: None is the rank, as programs read it that find none.

    rank: where tensors do not tell it. Raises AdapterError naming the layer: tensors of no known kind, or not all.
    """
    names = set(tensors)
    kind: Kind | None = next((one for one in ("lora", "dora", "loha") if names == TENSORS[one]), None)
    if kind is None and _is_lokr(names):
        kind = "lokr"
    if kind is None:
        raise AdapterError(f"{layer}: {', '.join(sorted(names))} are not the tensors of a LoRA, DoRA, LoHa or LoKr")
    found = Adapter(kind, tensors, 1.0, rank)
    return Adapter(kind, tensors, float(found.rank or 1) if alpha is None else alpha, rank)


def _is_lokr(names: set[str]) -> bool:
    def has(factor: str) -> bool:
        return (factor in names) != {f"{factor}_a", f"{factor}_b"}.issubset(names)

    return names <= TENSORS["lokr"] and has("lokr_w1") and has("lokr_w2")
