"""Adapters of stage C in files: kohya's, the official code's and PEFT's layouts, written and read.

{component: {layer: adapter}}, components being the network and the text encoder, layers named as in `adapter_names`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from training.lora.adapter import Adapter, AdapterError
from training.lora.kohya import is_kohya, read_kohya, write_kohya
from training.lora.official import is_official, read_official, write_official
from training.lora.peft_folder import read_peft, write_peft
from training.stage_c.adapter_names import (
    KOHYA_PREFIXES,
    NETWORK,
    TEXT,
    apart,
    from_diffusers,
    official_order,
    to_diffusers,
    together,
)
from training.weight_files import WeightsError, WeightsReport

Parts = Mapping[str, Mapping[str, Adapter]]


@dataclass(frozen=True)
class AdapterFile:
    """What a file holds. tokens: ids, and what each one's embedding changed by (N, width); official layout only."""

    parts: Parts
    tokens: tuple[Sequence[int], Tensor] = field(default_factory=lambda: ([], torch.zeros(0, 0)))


def write_adapters(
    folder: Path,
    parts: Parts,
    *,
    formats: Sequence[str],
    order: Sequence[str],
    dtype: torch.dtype,
    metadata: Mapping[str, str],
    tokens: tuple[Sequence[int], Tensor],
) -> list[WeightsReport]:
    """Write the layouts that `formats` names: `lora.safetensors`, `lora_official.safetensors`, `peft…/`.

    order: the network's layers in the order of its modules. Raises AdapterError for what a layout cannot hold.
    """
    reports = []
    if "kohya" in formats:
        written = {component: apart(adapters) for component, adapters in parts.items()}
        prefixes = {component: names[0] for component, names in KOHYA_PREFIXES.items()}
        path = folder / "lora.safetensors"
        reports.append(write_kohya(path, written, prefixes=prefixes, dtype=dtype, metadata=metadata))
    if "official" in formats:
        reports.append(
            write_official(
                folder / "lora_official.safetensors", together(parts.get(NETWORK, {})), order=official_order(order),
                tokens=tokens, dtype=dtype, metadata=metadata,
            )
        )  # fmt: skip
    if "peft" in formats:
        for component, adapters in parts.items():
            named = {
                to_diffusers(name) if component == NETWORK else name: adapter
                for name, adapter in apart(adapters).items()
            }
            place = folder / ("peft" if component == NETWORK else "peft_text_encoder")
            reports.append(write_peft(place, named, dtype=dtype, metadata=metadata))
    return reports


def read_adapters(
    path: Path, *, shapes: Mapping[str, torch.Size], order: Sequence[str], text_layers: Sequence[str]
) -> AdapterFile:
    """Return the adapters of a file of any of the layouts.

    shapes: of the network's weights by layer, with q, k and v together and apart; order: layers that a nameless file
    of the official code numbers; text_layers: the text encoder's. Raises FileNotFoundError, AdapterError.
    """
    if path.is_dir():
        return AdapterFile(_parts_of_folder(path))
    if path.suffix != ".safetensors":
        raise AdapterError(f"{path}: give a .safetensors file, or a folder that PEFT wrote")
    keys = _keys(path)
    if is_official(keys):
        adapters, tokens = read_official(path, order=order, shapes=shapes)
        return AdapterFile({NETWORK: adapters}, tokens)
    if is_kohya(keys):
        layers = {NETWORK: list(shapes), TEXT: text_layers}
        return AdapterFile(read_kohya(path, layers=layers, prefixes=KOHYA_PREFIXES))
    raise AdapterError(
        f"{path}: neither kohya's keys (lora_unet_…) nor the official code's (weights.0.lora_down); it starts with "
        f"{', '.join(keys[:3])}"
    )


def _parts_of_folder(folder: Path) -> Parts:
    """Return what a folder of PEFT's holds, and the folder of the text encoder beside it."""
    beside = folder.with_name("peft_text_encoder")
    parts: dict[str, dict[str, Adapter]] = {}
    for one in [folder, *([beside] if folder.name == "peft" and beside.is_dir() else [])]:
        for name, adapter in read_peft(one).items():
            is_text = name.startswith("text_model.") or ".self_attn." in name
            component, own = (TEXT, name) if is_text else (NETWORK, from_diffusers(name))
            parts.setdefault(component, {})[own] = adapter
    return parts


def _keys(path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of adapters")
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise WeightsError(f"{path}: not a readable safetensors file ({error})") from error
