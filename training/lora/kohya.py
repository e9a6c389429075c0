"""Adapters in one .safetensors file as kohya's sd-scripts and LyCORIS write it, and ComfyUI and A1111 read it.

A layer `down_blocks.0.2.attention.attn.to_q` is `lora_unet_down_blocks_0_2_attention_attn_to_q` with
`.lora_down.weight`, `.lora_up.weight` and `.alpha` behind it, or the tensors of a LoHa, LoKr or DoRA. The alpha is the
true one, in fp32.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from training.lora.adapter import Adapter, AdapterError, adapter_of
from training.weight_files import WeightsReport, read_tensors, write_tensors

Parts = Mapping[str, Mapping[str, Adapter]]
"""{component: {layer: adapter}}."""


def write_kohya(
    path: Path, parts: Parts, *, prefixes: Mapping[str, str], dtype: torch.dtype, metadata: Mapping[str, str]
) -> WeightsReport:
    """Write adapters. prefixes: what keys of each component begin with (`lora_unet`, `lora_te`)."""
    tensors: dict[str, Tensor] = {}
    for component, adapters in parts.items():
        for layer, adapter in adapters.items():
            stem = _stem(prefixes[component], layer)
            own, alpha = dict(adapter.tensors), adapter.alpha
            if adapter.inner_rank is None:  # readers do not scale a LoKr of two whole factors
                own["lokr_w1"], alpha = own["lokr_w1"] * adapter.scale, 1.0
            tensors |= {f"{stem}.{name}": tensor for name, tensor in own.items()}
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    return write_cast(path, tensors, dtype=dtype, metadata=metadata, keep=".alpha")


def write_cast(
    path: Path, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, metadata: Mapping[str, str], keep: str
) -> WeightsReport:
    """Write tensors in `dtype`, but for integers and names that end with `keep`; count what the cast lost."""
    cast, overflowed, vanished = {}, 0, 0
    for name, tensor in tensors.items():
        value = tensor if name.endswith(keep) or not tensor.is_floating_point() else tensor.to(dtype)
        overflowed += int((tensor.isfinite() & ~value.isfinite()).sum())
        vanished += int(((tensor != 0) & (value == 0)).sum())
        cast[name] = value
    report = write_tensors(path, cast, metadata=metadata)
    return replace(report, num_overflowed=overflowed, num_vanished=vanished)


def read_kohya(
    path: Path, *, layers: Mapping[str, Iterable[str]], prefixes: Mapping[str, tuple[str, ...]]
) -> dict[str, dict[str, Adapter]]:
    """Return a file's adapters by component and layer.

    layers: the names that each component has, because underscores cannot be told from dots; prefixes: of each, all
    that are in use. Raises AdapterError for a key that belongs to none of them.
    """
    places = {
        _stem(prefix, layer): (component, layer)
        for component, names in layers.items()
        for layer in names
        for prefix in prefixes[component]
    }
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    strangers = []
    for key, tensor in read_tensors(path, anchor=None)[0].items():
        stem, _, name = key.partition(".")
        if stem in places:
            found.setdefault(places[stem], {})[name] = tensor
        else:
            strangers.append(key)
    if strangers:
        raise AdapterError(
            f"{path}: {', '.join(strangers[:3])} ({len(strangers):,} keys in all) belong to no layer of this model"
        )
    parts: dict[str, dict[str, Adapter]] = {}
    for (component, layer), tensors in found.items():
        alpha = tensors.pop("alpha", None)
        adapter = adapter_of(tensors, None if alpha is None else float(alpha), layer=f"{path}: {layer}")
        parts.setdefault(component, {})[layer] = adapter
    return parts


def is_kohya(keys: Iterable[str]) -> bool:
    """Tell whether keys are of this layout."""
    return any(key.startswith("lora_") and ("_te" in key.split(".")[0] or "_unet" in key.split(".")[0]) for key in keys)


def _stem(prefix: str, layer: str) -> str:
    return f"{prefix}_{layer.replace('.', '_')}"
