"""Weights with adapters in them: of a model that has them as layers, or of plain weights and a file's adapters."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from training.lora.adapter import Adapter, AdapterError
from training.lora.layers import BASE_LAYER, LayerChoice, is_adapter, taken_out


def merged_state(
    state: Mapping[str, Tensor], layers: Iterable[LayerChoice], *, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return a component's weights, named as before it had adapters, with those of `layers` in them.

    dtype: of changed weights, others keep theirs.
    """
    plain = {name.replace(BASE_LAYER, ""): tensor for name, tensor in state.items() if not is_adapter(name)}
    for name, adapter in taken_out(state, layers).items():
        plain[f"{name}.weight"] = adapter.merged(plain[f"{name}.weight"]).to(dtype)
    return plain


@torch.no_grad()
def merge_into(state: Mapping[str, Tensor], adapters: Mapping[str, Adapter], *, scale: float, source: str) -> None:
    """Change weights in place. scale: 1 is as trained. Raises AdapterError for a layer that is not there."""
    for name, adapter in adapters.items():
        weight = state.get(f"{name}.weight")
        if weight is None:
            raise AdapterError(f"{source}: {name} is no layer of these weights")
        weight.copy_(adapter.merged(weight, strength=scale))
