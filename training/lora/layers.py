"""Put PEFT's adapters on the layers that patterns name, and take them out of a state by name.

Works on any module. Adapters are fp32 and start by a seed of their own, so that all ranks and launches start alike.
Which layers there are by default, and what other programs call them, is the recipe's.
"""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training.lora.adapter import DOWN, MAGNITUDE, UP, Adapter, AdapterError, Kind, adapter_of
from training.optim.selection import PatternError, matching

_NAME = "default"  # PEFT's, of the one adapter
_IN_PEFT = {
    DOWN: f"lora_A.{_NAME}.weight",
    UP: f"lora_B.{_NAME}.weight",
    MAGNITUDE: f"lora_magnitude_vector.{_NAME}.weight",
}
BASE_LAYER = ".base_layer"


@dataclass(frozen=True)
class LayerChoice:
    """An adapted layer. name: in its component, as before adapters are there."""

    name: str
    rank: int
    alpha: float


def adaptable(module: nn.Module) -> list[str]:
    """Return the names of layers that can have an adapter: Linear and Conv2d that is not grouped."""
    return [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    ]


def adaptable_names(module: nn.Module) -> list[str]:
    """Return names of layers that can have an adapter, as they were before any was there."""
    return [name.removesuffix(BASE_LAYER) for name in adaptable(module) if not is_adapter(name)]


def is_adapter(name: str) -> bool:
    """Return whether a parameter is an adapter's."""
    return any(mark in name for mark in (".lora_", ".hada_", ".lokr_"))


def chosen(
    module: nn.Module,
    targets: Sequence[str],
    *,
    rank: int,
    alpha: float,
    blocks: Iterable[tuple[str, Sequence[str], int, float]] = (),
    key: str = "lora.targets",
) -> dict[str, list[LayerChoice]]:
    """Return {"": layers that `targets` match, block name: those of them that a block takes out}.

    blocks: (name, patterns, rank, alpha) in the order of the config. key: the setting, for messages.
    Raises PatternError for a pattern that matches no layer, and for a layer in two blocks.
    """
    names = adaptable(module)
    hit = {name for found in matching(names, targets, key=key, what="layer").values() for name in found}
    targeted = [name for name in names if name in hit]
    owners: dict[str, str] = {}
    parts: dict[str, list[LayerChoice]] = {"": []}
    for block, patterns, own_rank, own_alpha in blocks:
        found = matching(targeted, patterns, key=f"lora.blocks.{block}", what="targeted layer")
        for name in dict.fromkeys(name for hits in found.values() for name in hits):
            if name in owners:
                raise PatternError(f"lora.blocks: {name} is in {owners[name]!r} and in {block!r}")
            owners[name] = block
            parts.setdefault(block, []).append(LayerChoice(name, own_rank, own_alpha))
    parts[""] = [LayerChoice(name, rank, alpha) for name in targeted if name not in owners]
    return parts


def add_adapters(module: nn.Module, layers: Sequence[LayerChoice], *, kind: Kind, dropout: float, seed: int) -> None:
    """Put adapters on layers of a module, in place. dropout: of what goes into a LoRA's or DoRA's down projection.

    The layer `X` is then PEFT's, with the old one at `X.base_layer`; what was trained before is not touched.
    """
    from peft import inject_adapter_in_model

    shared = {
        "target_modules": f"({'|'.join(re.escape(layer.name) for layer in layers)})",
        # Of other layers only: PEFT tries every pattern on every layer.
        "rank_pattern": {f"^{re.escape(one.name)}": one.rank for one in layers if one.rank != layers[0].rank},
        "alpha_pattern": {f"^{re.escape(one.name)}": one.alpha for one in layers if one.alpha != layers[0].alpha},
    }
    wanted = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT on models that are not of transformers
        torch.manual_seed(seed)
        inject_adapter_in_model(_peft_config(kind, layers[0], shared, dropout), module)
    for name, parameter in module.named_parameters():
        if name.replace(BASE_LAYER, "") in wanted:  # PEFT freezes all that is not its own
            parameter.requires_grad_(wanted[name.replace(BASE_LAYER, "")])
        elif parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


def _peft_config(kind: Kind, first: LayerChoice, shared: Mapping[str, Any], dropout: float) -> Any:
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    if kind in ("lora", "dora"):
        return LoraConfig(
            r=first.rank, lora_alpha=first.alpha, lora_dropout=dropout, use_dora=kind == "dora", **shared,  # type: ignore[arg-type]
        )  # fmt: skip
    if dropout:
        raise ValueError(f"lora.dropout {dropout:g}: a {kind} has no down projection to drop from; set it to 0")
    return (LoHaConfig if kind == "loha" else LoKrConfig)(r=first.rank, alpha=first.alpha, **shared)  # type: ignore[arg-type]


def adapter_names(layer: str, names: Iterable[str]) -> dict[str, str]:
    """Return {a tensor's name as in files: its name in a state} of one layer, of those that `names` holds."""
    every = [*_IN_PEFT, *(f"{one}" for one in _LYCORIS)]
    pairs = {one: f"{layer}.{_IN_PEFT.get(one, f'{one}.{_NAME}')}" for one in every}
    held = set(names)
    return {one: name for one, name in pairs.items() if name in held}


_LYCORIS = (
    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b",
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b",
)  # fmt: skip


def taken_out(state: Mapping[str, Tensor], layers: Iterable[LayerChoice]) -> dict[str, Adapter]:
    """Return the adapters of a component by layer. state: its tensors by name, those of the base may be missing."""
    adapters = {}
    for layer in layers:
        names = adapter_names(layer.name, state)
        tensors = {one: state[name].detach() for one, name in names.items()}
        if MAGNITUDE in tensors:  # PEFT's is flat for a linear layer and (1, out, 1, 1) for a convolution
            ndim = tensors[DOWN].ndim
            tensors[MAGNITUDE] = tensors[MAGNITUDE].reshape(-1, *[1] * (ndim - 1))
        adapters[layer.name] = adapter_of(tensors, layer.alpha, layer=layer.name, rank=layer.rank)
    return adapters


@torch.no_grad()
def put_in(module: nn.Module, layers: Iterable[LayerChoice], adapters: Mapping[str, Adapter], *, source: str) -> int:
    """Start the module's adapters from others; those that `adapters` lacks stay as they are. Return how many did start.

    Where alpha / rank differs, the change is kept and the up projection is scaled. source: the file, for messages.
    Raises AdapterError for layers that have no adapter here, another kind or another rank.
    """
    by_name = {layer.name: layer for layer in layers}
    if strangers := sorted(set(adapters) - set(by_name)):
        raise AdapterError(
            f"{source}: has adapters for {', '.join(strangers[:3])} ({len(strangers):,} in all) that lora.targets "
            "does not name"
        )
    state = dict(module.named_parameters())
    for name, adapter in adapters.items():
        layer, names = by_name[name], adapter_names(name, state)
        if set(names) != set(adapter.tensors):
            raise AdapterError(
                f"{source}: {name} is a {adapter.kind} of {', '.join(sorted(adapter.tensors))}; this run has "
                f"{', '.join(sorted(names))}"
            )
        factor = adapter.scale / (layer.alpha / layer.rank)  # bit for bit where they are the same
        for one, tensor in adapter.tensors.items():
            own = state[names[one]]
            value = tensor.reshape(own.shape) if tensor.numel() == own.numel() else None
            if value is None or (one != MAGNITUDE and tensor.shape != own.shape):
                raise AdapterError(
                    f"{source}: {name} {one} is {tuple(tensor.shape)}, this run has {tuple(own.shape)}; "
                    f"the file's rank is {adapter.rank}: set lora.rank to it"
                )
            own.copy_(value * factor if one in _SCALED and factor != 1.0 else value)
    return len(adapters)


_SCALED = frozenset({UP, "hada_w1_a", "lokr_w1", "lokr_w1_a"})
"""Factors that a change of scale goes into: each kind has one of them."""
