"""Make a file of LoRAs smaller, whatever model it is for: each layer's singular values, the largest kept."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from training.lora.adapter import AdapterError, adapter_of
from training.lora.kohya import is_kohya, write_cast
from training.lora.svd import Reduced, resized
from training.weight_files import WeightsReport, read_tensors

_OF_CONTENT = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
"""Header entries that are about the bytes of the file that was read."""


def resize_file(
    path: Path, output: Path, *, rank: int | None, share: float = 1.0, dtype: torch.dtype
) -> tuple[WeightsReport, dict[str, Reduced]]:
    """Write a kohya file's LoRAs with at most `rank`, keeping `share` of each one's norm; see `training.lora.svd`.

    Returns what was written, and what became of each layer. Raises AdapterError for other layouts and kinds,
    ValueError for limits that are none.
    """
    if (rank is None and share >= 1) or not 0 < share <= 1 or (rank is not None and rank < 1):
        raise ValueError(f"resize to what? rank {rank}, share {share:g}: give a rank of 1 or more, a share below 1")
    tensors, metadata = read_tensors(path, anchor=None)
    if not is_kohya(tensors):
        raise AdapterError(f"{path}: is not of kohya's layout (lora_unet_….lora_down.weight), which can be resized")
    results: dict[str, Reduced] = {}
    for stem, own in _by_layer(tensors):
        alpha = own.pop("alpha", None)
        adapter = adapter_of(own, None if alpha is None else float(alpha), layer=f"{path}: {stem}")
        results[stem] = resized(adapter, rank=rank, share=share, layer=f"{path}: {stem}")
    report = write_cast(output, _in_kohya(results), dtype=dtype, metadata=_header(metadata, results), keep=".alpha")
    return report, results


def _by_layer(tensors: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        stem, _, name = key.partition(".")
        layers.setdefault(stem, {})[name] = tensor
    yield from layers.items()


def _in_kohya(results: dict[str, Reduced]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for stem, result in results.items():
        tensors |= {f"{stem}.{name}": tensor for name, tensor in result.adapter.tensors.items()}
        tensors[f"{stem}.alpha"] = torch.tensor(result.adapter.alpha)
    return tensors


def _header(metadata: dict[str, str], results: dict[str, Reduced]) -> dict[str, str]:
    ranks = {result.adapter.rank for result in results.values()}
    size = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    kept = {key: text for key, text in metadata.items() if key not in _OF_CONTENT}
    return kept | {"ss_network_dim": size, "ss_network_alpha": size}
