"""Adapters and trained tokens in one file as the official StableCascade LoRA code saves and loads them.

`weights.N.lora_down` (rank, in) and `weights.N.lora_up` (out, rank), numbered in the order of the network's modules,
without names; `embeddings.embeddings` holds what each trained token's embedding changed by, `embeddings.indices` its
id. That code multiplies by 1 / rank and has one rank for all: another scale is put into lora_up, smaller ranks get
zeros. Names, ranks and alphas are in the metadata, so that reading it here gives back what was written.
Source: Stability-AI/StableCascade, modules/lora.py and train/train_c_lora.py.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from training.lora.adapter import DOWN, UP, Adapter, AdapterError
from training.lora.kohya import write_cast
from training.weight_files import WeightsReport, read_tensors

LAYERS_METADATA_KEY = "chunkline.lora_layers"


def write_official(
    path: Path,
    adapters: Mapping[str, Adapter],
    *,
    order: Sequence[str],
    tokens: tuple[Sequence[int], Tensor],
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> WeightsReport:
    """Write LoRAs of linear layers and 1×1 convolutions. order: all layers as the official code meets them.

    tokens: ids (N,) and changes of their embeddings (N, width), perhaps none. Raises AdapterError for what the layout
    cannot hold.
    """
    layers = [name for name in order if name in adapters]
    if missing := sorted(set(adapters) - set(layers)):
        raise AdapterError(f"{path}: the official layout has no place for {', '.join(missing[:3])} ({len(missing):,})")
    rank = max((adapters[name].tensors[DOWN].shape[0] for name in layers), default=1)
    tensors, facts = {}, []
    for number, name in enumerate(layers):
        adapter = adapters[name]
        down, up = adapter.tensors[DOWN], adapter.tensors[UP]
        if adapter.kind != "lora" or down[0, 0].numel() != 1:
            raise AdapterError(f"{path}: {name}: the official layout holds LoRAs without kernels only")
        own = down.shape[0]
        factor = adapter.scale * rank
        up = up.flatten(1) if factor == 1.0 else up.flatten(1) * factor
        tensors[f"weights.{number}.lora_down"] = F.pad(down.flatten(1), (0, 0, 0, rank - own))
        tensors[f"weights.{number}.lora_up"] = F.pad(up, (0, rank - own))
        facts.append([name, own, adapter.alpha])
    ids, changes = tokens
    tensors |= {"embeddings.embeddings": changes, "embeddings.indices": torch.tensor(ids) if ids else torch.zeros(0)}
    header = {**metadata, LAYERS_METADATA_KEY: json.dumps(facts)}
    return write_cast(path, tensors, dtype=dtype, metadata=header, keep=".indices")


def read_official(
    path: Path, *, order: Sequence[str], shapes: Mapping[str, torch.Size]
) -> tuple[dict[str, Adapter], tuple[list[int], Tensor]]:
    """Return adapters by layer, and the ids and changes of tokens.

    order: layers to number by where the file does not name them, as its training chose them; shapes: of their weights.
    Raises AdapterError when they do not fit.
    """
    tensors, metadata = read_tensors(path, anchor=None)
    num_layers = sum(key.endswith(".lora_down") for key in tensors)
    if LAYERS_METADATA_KEY in metadata:
        facts = [
            (str(name), int(rank), float(alpha)) for name, rank, alpha in json.loads(metadata[LAYERS_METADATA_KEY])
        ]
    else:
        facts = [(name, 0, 1.0) for name in order]
    if len(facts) != num_layers:
        raise AdapterError(
            f"{path}: {num_layers:,} layers without names, lora.targets names {len(facts):,}; set it to what the file "
            "was trained with"
        )
    adapters = {}
    for number, (name, own, alpha) in enumerate(facts):
        down, up = tensors[f"weights.{number}.lora_down"], tensors[f"weights.{number}.lora_up"]
        shape = shapes.get(name)
        if shape is None or (up.shape[0], down.shape[1]) != (shape[0], shape[1]):
            raise AdapterError(
                f"{path}: layer {number} changes a weight of {up.shape[0]} × {down.shape[1]}; {name} is "
                f"{'not in this model' if shape is None else tuple(shape)}"
            )
        rank = down.shape[0]
        own = own or rank
        factor = alpha / own * rank
        kernel = [1] * (len(shape) - 2)
        up = up[:, :own] if factor == 1.0 else up[:, :own] / factor
        parts = {DOWN: down[:own].reshape(own, -1, *kernel), UP: up.reshape(-1, own, *kernel).contiguous()}
        adapters[name] = Adapter("lora", parts, alpha)
    ids = tensors.get("embeddings.indices", torch.zeros(0)).long().tolist()
    return adapters, (ids, tensors.get("embeddings.embeddings", torch.zeros(0, 0)))


def is_official(keys: Sequence[str]) -> bool:
    """Tell whether keys are of this layout."""
    return any(key.startswith("weights.") and key.endswith(".lora_down") for key in keys)
