"""Adapters of one component as a folder of PEFT's: `adapter_config.json` and `adapter_model.safetensors`.

`PeftModel.from_pretrained(network, folder)` loads it, and so does this. Layer names are those of the network that the
folder is for.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.lora.adapter import DOWN, MAGNITUDE, UP, Adapter, AdapterError, adapter_of
from training.lora.kohya import write_cast
from training.weight_files import WeightsReport, read_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ROOT = "base_model.model."
_IN_FILE = {DOWN: "lora_A.weight", UP: "lora_B.weight", MAGNITUDE: "lora_magnitude_vector"}
_FROM_FILE = {name: one for one, name in _IN_FILE.items()}


def write_peft(
    folder: Path, adapters: Mapping[str, Adapter], *, dtype: torch.dtype, metadata: Mapping[str, str]
) -> WeightsReport:
    """Write adapters of one kind, by layer."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for layer, adapter in adapters.items():
        for name, tensor in adapter.tensors.items():
            flat = name == MAGNITUDE and tensor.ndim == 2
            tensors[f"{_ROOT}{layer}.{_IN_FILE.get(name, name)}"] = tensor.reshape(-1) if flat else _conv(name, tensor)
    text = json.dumps(_config(adapters), indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    return write_cast(folder / WEIGHTS, tensors, dtype=dtype, metadata=metadata, keep=".none")


def _conv(name: str, tensor: Tensor) -> Tensor:
    """PEFT's magnitude of a convolution is (1, out, 1, 1)."""
    return tensor.transpose(0, 1) if name == MAGNITUDE else tensor


def _config(adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    ranks = {layer: adapter.rank for layer, adapter in adapters.items()}
    if unknown := [layer for layer, rank in ranks.items() if rank is None]:
        raise AdapterError(f"{', '.join(unknown[:3])}: a LoKr of two whole factors has no rank to tell PEFT")
    alphas = {layer: adapter.alpha for layer, adapter in adapters.items()}
    kind, first = next(iter(adapters.values())).kind, next(iter(adapters))
    shared: dict[str, Any] = {
        "r": ranks[first],
        "target_modules": sorted(adapters),
        "rank_pattern": {f"^{re.escape(layer)}": rank for layer, rank in ranks.items() if rank != ranks[first]},
        "alpha_pattern": {f"^{re.escape(layer)}": alpha for layer, alpha in alphas.items() if alpha != alphas[first]},
        "inference_mode": True,
    }
    config: Any
    if kind in ("lora", "dora"):
        config = LoraConfig(lora_alpha=alphas[first], use_dora=kind == "dora", **shared)  # type: ignore[arg-type]
    else:
        config = (LoHaConfig if kind == "loha" else LoKrConfig)(alpha=alphas[first], **shared)  # type: ignore[arg-type]
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    return json.loads(json.dumps(values, default=str))  # type: ignore[no-any-return]


def read_peft(folder: Path) -> dict[str, Adapter]:
    """Return a folder's adapters by layer. Raises FileNotFoundError, AdapterError."""
    config_path = folder / CONFIG
    if not config_path.is_file():
        raise FileNotFoundError(f"{folder}: no {CONFIG}; give a folder that PEFT wrote, or a .safetensors file")
    config = json.loads(config_path.read_text("utf-8"))
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(folder / WEIGHTS, anchor=None)[0].items():
        layer, name = _split(key.removeprefix(_ROOT))
        if not name:
            raise AdapterError(f"{folder}: {key!r} is no tensor of a LoRA, DoRA, LoHa or LoKr")
        found.setdefault(layer, {})[name] = as_rows(tensor) if name == MAGNITUDE else tensor
    alphas, ranks = config.get("alpha_pattern") or {}, config.get("rank_pattern") or {}
    alpha = float(config.get("lora_alpha", config.get("alpha", 1.0)))
    return {
        layer: adapter_of(
            tensors,
            float(pattern_value(alphas, layer, alpha)),
            layer=f"{folder}: {layer}",
            rank=int(pattern_value(ranks, layer, config["r"])),
        )
        for layer, tensors in found.items()
    }


def as_rows(magnitude: Tensor) -> Tensor:
    """Return a magnitude of PEFT's, flat or (1, out, …) of a convolution, as (out, 1, …)."""
    return magnitude.reshape(-1, 1) if magnitude.ndim == 1 else magnitude.transpose(0, 1)


def pattern_value(patterns: Mapping[str, float], layer: str, default: float) -> float:
    """Return what PEFT's pattern says for a layer: a regular expression for its name, or the end of it."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), default)


def _split(key: str) -> tuple[str, str]:
    for name in (*_FROM_FILE, *(f"{one}.weight" for one in ("lora_magnitude_vector",))):
        if key.endswith(f".{name}"):
            return key.removesuffix(f".{name}"), _FROM_FILE.get(name, MAGNITUDE)
    layer, _, name = key.rpartition(".")
    return layer, name if name.startswith(("hada_", "lokr_")) else ""
