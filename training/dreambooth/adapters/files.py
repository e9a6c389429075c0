"""Adapters of Stable Diffusion in files: kohya's and diffusers' layouts written, and PEFT's folders read, too.

{component: {layer: adapter}}, layers named as in `names`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from training.dreambooth.adapters.names import KOHYA_PREFIXES, TEXT, UNET, kohya_names, text_parts
from training.dreambooth.single_file.layout import Family
from training.dreambooth.single_file.text_names import with_prefix_name
from training.lora.adapter import DOWN, MAGNITUDE, UP, Adapter, AdapterError, adapter_of
from training.lora.kohya import is_kohya, read_kohya, write_cast, write_kohya
from training.lora.peft_folder import CONFIG, as_rows, pattern_value, read_peft
from training.weight_files import WeightsReport, open_weights, read_tensors

Parts = Mapping[str, Mapping[str, Adapter]]
KOHYA_FILE, DIFFUSERS_FILE = "lora.safetensors", "pytorch_lora_weights.safetensors"
_IN_DIFFUSERS = {DOWN: "lora_A.weight", UP: "lora_B.weight", MAGNITUDE: "lora_magnitude_vector.weight"}
_FROM_DIFFUSERS = {theirs.removesuffix(".weight"): ours for ours, theirs in _IN_DIFFUSERS.items()}
_DIFFUSERS_KEY = re.compile(
    r"(unet|text_encoder|text_encoder_2)\.(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?|alpha)"
)


def write_adapters(
    folder: Path,
    parts: Parts,
    *,
    family: Family,
    unet_layers: Sequence[str],
    formats: Sequence[str],
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> list[WeightsReport]:
    """Write the layouts that `formats` names. unet_layers: all that the UNet has, by which original names are counted.

    Raises AdapterError for what a layout cannot hold.
    """
    reports = []
    if "kohya" in formats:
        reports.append(
            write_kohya_file(
                folder / KOHYA_FILE, parts, family=family, unet_layers=unet_layers, dtype=dtype, metadata=metadata
            )
        )
    if "diffusers" in formats:
        reports.append(_write_diffusers(folder / DIFFUSERS_FILE, parts, dtype=dtype, metadata=metadata))
    return reports


def write_kohya_file(
    path: Path,
    parts: Parts,
    *,
    family: Family,
    unet_layers: Sequence[str],
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> WeightsReport:
    """Write one file as kohya's trainer does; see `write_adapters`."""
    renamed = {}
    for part, adapters in parts.items():
        names = kohya_names(part, unet_layers if part == UNET else adapters, family)
        renamed[part] = {names[layer]: adapter for layer, adapter in adapters.items()}
    prefixes = {part: names[0] for part, names in KOHYA_PREFIXES[family].items()}
    return write_kohya(path, renamed, prefixes=prefixes, dtype=dtype, metadata=metadata)


def _write_diffusers(path: Path, parts: Parts, *, dtype: torch.dtype, metadata: Mapping[str, str]) -> WeightsReport:
    """Write what `load_lora_weights` reads. The layout has no alpha that all its readers know: the scale is put into
    lora_B, and alpha is then the rank, as readers take it."""
    tensors: dict[str, Tensor] = {}
    for part, adapters in parts.items():
        for layer, adapter in adapters.items():
            if adapter.kind not in ("lora", "dora"):
                raise AdapterError(f"{path}: {layer}: diffusers' layout holds LoRA and DoRA, not {adapter.kind}")
            stem = f"{part}.{layer if part == UNET else with_prefix_name(layer)}"
            own = {**adapter.tensors, UP: adapter.tensors[UP] * adapter.scale}
            if MAGNITUDE in own:  # flat of a linear layer, (1, out, 1, 1) of a convolution, as PEFT has it
                rows = own[MAGNITUDE]
                own[MAGNITUDE] = rows.reshape(-1) if rows.ndim == 2 else rows.transpose(0, 1)
            tensors |= {f"{stem}.{_IN_DIFFUSERS[name]}": tensor for name, tensor in own.items()}
    return write_cast(path, tensors, dtype=dtype, metadata=metadata, keep=".none")


def read_adapters(path: Path, *, family: Family, layers: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Adapter]]:
    """Return the adapters of a file of any of the layouts, or of a folder of diffusers or PEFT.

    layers: the names that each component has, of the UNet all. Raises FileNotFoundError, AdapterError, WeightsError.
    """
    if path.is_dir():
        if (path / DIFFUSERS_FILE).is_file():
            return read_adapters(path / DIFFUSERS_FILE, family=family, layers=layers)
        return _read_folder(path, family, layers)
    if path.suffix != ".safetensors":
        raise AdapterError(f"{path}: give a .safetensors file, or a folder that diffusers or PEFT wrote")
    with open_weights(path) as file:
        keys = file.keys
    if is_kohya(keys):
        return _read_kohya(path, family, layers)
    if any(_DIFFUSERS_KEY.fullmatch(key) for key in keys):
        return _read_diffusers(path, layers)
    raise AdapterError(
        f"{path}: neither kohya's keys (lora_unet_…) nor diffusers' (unet.….lora_A.weight); it starts with "
        f"{', '.join(sorted(keys)[:3])}"
    )


def _read_kohya(path: Path, family: Family, layers: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Adapter]]:
    """Read original names of SDXL's UNet, and diffusers', which other trainers write."""
    back = {
        part: {**{layer: layer for layer in own}, **{name: layer for layer, name in names.items()}}
        for part, own in layers.items()
        for names in [kohya_names(part, own, family)]
    }
    found = read_kohya(path, layers=back, prefixes=KOHYA_PREFIXES[family])
    return {part: {back[part][name]: adapter for name, adapter in own.items()} for part, own in found.items()}


def _read_diffusers(path: Path, layers: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Adapter]]:
    places = {
        f"{part}.{layer if part == UNET else with_prefix_name(layer)}": (part, layer)
        for part, own in layers.items()
        for layer in own
    }
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    strangers = []
    tensors, metadata = read_tensors(path, anchor=None)
    for key, tensor in tensors.items():
        match = _DIFFUSERS_KEY.fullmatch(key)
        if match is None or (place := places.get(f"{match[1]}.{match[2]}")) is None:
            strangers.append(key)
        else:
            found.setdefault(place, {})[match[3].removesuffix(".weight")] = tensor
    if strangers:
        raise AdapterError(
            f"{path}: {', '.join(strangers[:3])} ({len(strangers):,} keys in all) belong to no layer of this model"
        )
    parts: dict[str, dict[str, Adapter]] = {}
    for (part, layer), own in found.items():
        alpha = own.pop("alpha", None)
        parts.setdefault(part, {})[layer] = adapter_of(
            {
                _FROM_DIFFUSERS[name]: as_rows(tensor) if name == "lora_magnitude_vector" else tensor
                for name, tensor in own.items()
            },
            float(alpha) if alpha is not None else _alpha_in(metadata, part, layer),
            layer=f"{path}: {layer}",
        )
    return parts


def _alpha_in(metadata: Mapping[str, str], part: str, layer: str) -> float | None:
    """Return what diffusers' own metadata says; without it readers take the rank."""
    own = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    if f"{part}.lora_alpha" not in own:
        return None
    patterns = own.get(f"{part}.alpha_pattern") or {}
    return float(pattern_value(patterns, layer, own[f"{part}.lora_alpha"]))


def _read_folder(folder: Path, family: Family, layers: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Adapter]]:
    """Read folders of PEFT's by component, or a single one, of the UNet or the first text model by its names."""
    folders = {part: folder / part for part in (UNET, *text_parts(family)) if (folder / part / CONFIG).is_file()}
    found: dict[str, dict[str, Adapter]] = {}
    for place in [*folders.values()] or [folder]:
        for name, adapter in read_peft(place).items():
            part = place.name if folders else UNET if "_block" in name.partition(".")[0] else TEXT
            own = {with_prefix_name(layer): layer for layer in layers.get(part, ())} if part != UNET else {}
            found.setdefault(part, {})[own.get(with_prefix_name(name), name)] = adapter
    return found
