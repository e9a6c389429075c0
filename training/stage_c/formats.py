"""Load and save stage C weights in the three layouts in use, without changing a bit.

original: Stability's and ComfyUI's files, q, k and v stacked in `attention.attn.in_proj_weight`; also our network's.
kohya: that trainer's `-state` folders, `attention.attn.to_q` / `to_k` / `to_v`.
diffusers: StableCascadeUNet, `attention.to_q` / `to_k` / `to_v` / `to_out.0`, a folder with a config.json.
The other keys are the same everywhere. Text model, encoder and previewer are loaded by their own modules.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from training.stage_c.network import StageCConfig, StageCNetwork, config_from_state_dict
from training.stage_c.weight_files import (
    WeightsError,
    WeightsReport,
    check_keys,
    load_into,
    locate_component,
    naming,
    read_tensors,
    write_tensors,
)

Layout = Literal["original", "kohya", "diffusers"]
ANCHOR = "clip_txt_mapper.weight"
CONFIG_METADATA_KEY = "chunkline.stage_c_config"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"
PACKED = (".attention.attn.in_proj_weight", ".attention.attn.in_proj_bias")


def detect_layout(keys: Iterable[str]) -> Layout:
    """Tell a state dict's layout by its attention keys. Raises WeightsError if there are none that are known."""
    names = list(keys)
    for marker, layout in (
        (".attention.attn.in_proj_weight", "original"),
        (".attention.attn.to_q.weight", "kohya"),
        (".attention.to_q.weight", "diffusers"),
    ):
        if any(name.endswith(marker) for name in names):
            return layout  # type: ignore[return-value]
    raise WeightsError(f"stage C weights: no attention keys among {len(names)}; this is another model, or a part of it")


def to_original(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename any of the three layouts to the original one; q, k and v are stacked, all else is passed through.

    Raises WeightsError if the layout is not known or one of q, k, v is missing.
    """
    layout = detect_layout(state_dict)
    if layout == "original":
        return dict(state_dict)
    infix = ".attention.attn.to_" if layout == "kohya" else ".attention.to_"
    result: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        block, _, rest = key.partition(infix)
        if not rest:
            result[key] = value
        elif rest.startswith("out.0."):
            result[f"{block}.attention.attn.out_proj.{rest.removeprefix('out.0.')}"] = value
        elif rest.startswith("q."):
            kind = rest.removeprefix("q.")
            parts = [f"{block}{infix}{letter}.{kind}" for letter in "qkv"]
            missing = [part for part in parts if part not in state_dict]
            if missing:
                raise WeightsError(f"stage C weights: {missing} missing beside {key!r}; the file is incomplete")
            packed = torch.cat([state_dict[part] for part in parts])
            result[f"{block}.attention.attn.in_proj_{kind}"] = packed
        elif rest[:2] not in ("k.", "v."):
            result[key] = value
    return result


def from_original(state_dict: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Rename the original layout to another; the parts of q, k and v are views of the same memory.

    Raises ValueError for an unknown layout.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be one of {get_args(Layout)}, got {layout!r}")
    if layout == "original":
        return dict(state_dict)
    result: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        block, marker, kind = key.partition(".attention.attn.in_proj_")
        if marker:
            infix = ".attention.attn.to_" if layout == "kohya" else ".attention.to_"
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                result[f"{block}{infix}{letter}.{kind}"] = part
        elif layout == "diffusers":
            result[key.replace(".attention.attn.out_proj.", ".attention.to_out.0.")] = value
        else:
            result[key] = value
    return result


def modelspec(*, title: str, width: int, height: int, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return ModelSpec 1.0.0 header entries for stage C; extra adds or replaces entries (without `modelspec.`).

    width, height: pixels of the pictures trained on. The date is left to the caller, so that equal weights give equal
    files. Source: Stability-AI/ModelSpec.
    """
    values = {
        "sai_model_spec": "1.0.0",
        "architecture": "stable-cascade",
        "implementation": "https://github.com/Stability-AI/StableCascade",
        "prediction_type": "epsilon",
        "title": title,
        "resolution": f"{width}x{height}",
        **(extra or {}),
    }
    return {f"modelspec.{key}": value for key, value in values.items()}


def config_to_diffusers(config: StageCConfig) -> dict[str, Any]:
    """Return the config.json of a diffusers StableCascadeUNet for this network."""
    levels = len(config.c_hidden)
    triple = ["SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"]
    return {
        "_class_name": "StableCascadeUNet",
        "in_channels": config.c_in,
        "out_channels": config.c_out,
        "timestep_ratio_embedding_dim": config.c_r,
        "patch_size": config.patch_size,
        "conditioning_dim": config.c_cond,
        "block_out_channels": list(config.c_hidden),
        "num_attention_heads": list(config.num_heads),
        "down_num_layers_per_block": list(config.blocks_down),
        "up_num_layers_per_block": list(config.blocks_up),
        "down_blocks_repeat_mappers": [1] * levels,
        "up_blocks_repeat_mappers": [1] * levels,
        "block_types_per_layer": [triple] * levels,
        "clip_text_in_channels": config.c_clip_text,
        "clip_text_pooled_in_channels": config.c_clip_text_pooled,
        "clip_image_in_channels": config.c_clip_img,
        "clip_seq": config.c_clip_seq,
        "effnet_in_channels": None,
        "pixel_mapper_in_channels": None,
        "kernel_size": 3,
        "dropout": list(config.dropout),
        "self_attn": config.self_attn,
        "timestep_conditioning_type": ["sca", "crp"],
        "switch_level": list(config.switch_level),
    }


def config_from_diffusers(values: Mapping[str, Any], *, source: Path | str) -> StageCConfig:
    """Read a StableCascadeUNet config.json.

    Raises WeightsError where an entry is missing or describes what our network is not (stage B, other blocks).
    """
    try:
        levels = len(values["block_out_channels"])
        dropout, self_attn = values["dropout"], values["self_attn"]
        config = StageCConfig(
            c_in=values["in_channels"],
            c_out=values["out_channels"],
            c_r=values["timestep_ratio_embedding_dim"],
            patch_size=values["patch_size"],
            c_cond=values["conditioning_dim"],
            c_hidden=tuple(values["block_out_channels"]),
            num_heads=tuple(values["num_attention_heads"]),
            blocks_down=tuple(values["down_num_layers_per_block"]),
            blocks_up=tuple(values["up_num_layers_per_block"]),
            c_clip_text=values["clip_text_in_channels"],
            c_clip_text_pooled=values["clip_text_pooled_in_channels"],
            c_clip_img=values["clip_image_in_channels"],
            c_clip_seq=values["clip_seq"],
            dropout=tuple(dropout) if isinstance(dropout, list) else (dropout,) * levels,
            self_attn=all(self_attn) if isinstance(self_attn, list) else self_attn,
            switch_level=tuple(values["switch_level"] or ()),
        )
    except KeyError as error:
        raise WeightsError(f"{source}: entry {error.args[0]!r} is missing; a StableCascadeUNet's is needed") from None
    ours = config_to_diffusers(config)
    for name in (
        "down_blocks_repeat_mappers",
        "up_blocks_repeat_mappers",
        "block_types_per_layer",
        "effnet_in_channels",
        "pixel_mapper_in_channels",
        "kernel_size",
        "timestep_conditioning_type",
    ):
        if name in values and values[name] != ours[name]:
            raise WeightsError(f"{source}: {name} is {values[name]!r}; stage C has {ours[name]!r}, is this stage B?")
    return config


def _config_from_metadata(text: str, source: Path) -> StageCConfig:
    try:
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in json.loads(text).items()
        }
        return StageCConfig(**values)
    except (json.JSONDecodeError, TypeError) as error:
        raise WeightsError(f"{source}: metadata {CONFIG_METADATA_KEY!r} is not a config ({error}); pass one") from error


def load_stage_c(
    path_or_id: str | Path, *, dtype: torch.dtype = torch.float32, config: StageCConfig | None = None
) -> StageCNetwork:
    """Load a stage C network, on the CPU and in training mode, from any of the layouts.

    path_or_id: a weights file (any layout, detected; also inside a combined checkpoint, behind a prefix), a diffusers
    folder (of the component, or of a pipeline with `prior/`), or a hub id (`owner/name`, read from `prior/`;
    `owner/name/prior_lite` names another subfolder).
    The config comes from the argument, else from the file's metadata or config.json, else from the shapes with heads
    of 64. Tensors are converted one by one: the peak is one copy in dtype, plus q, k and v of one block.

    Raises FileNotFoundError if nothing is there, WeightsError (a ValueError) listing what does not fit.
    """
    path = Path(path_or_id)
    if path.is_file():
        state_dict, metadata = read_tensors(path, anchor=ANCHOR, dtype=dtype)
        if config is None and CONFIG_METADATA_KEY in metadata:
            config = _config_from_metadata(metadata[CONFIG_METADATA_KEY], path)
    else:
        source, subfolder = locate_component(path_or_id, "prior", file_name="config.json")
        path = _download(source, subfolder) if subfolder else Path(source)
        values = json.loads((path / "config.json").read_text("utf-8"))
        config = config or config_from_diffusers(values, source=path / "config.json")
        state_dict = {}
        for file in _weights_in_folder(path):
            state_dict.update(read_tensors(file, anchor=None, dtype=dtype)[0])
    return network_from_state_dict(state_dict, config=config, source=path)


def network_from_state_dict(
    state_dict: Mapping[str, Tensor], *, config: StageCConfig | None = None, source: Path | str = "state dict"
) -> StageCNetwork:
    """Return a network that holds these tensors (any layout), without another copy of what needs no stacking.

    Raises WeightsError listing missing and unexpected keys and wrong shapes.
    """
    with naming(source):
        original = to_original(state_dict)
        config = config or config_from_state_dict(original)
    with torch.device("meta"):
        network = StageCNetwork(config)
    load_into(network, original, source=source)
    return network


def _download(repository: str, subfolder: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [f"{subfolder}/config.json", f"{subfolder}/{DIFFUSERS_WEIGHTS}*.safetensors*"]
    try:
        folder = Path(snapshot_download(repository, allow_patterns=patterns)) / subfolder
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"stage C {repository!r}: neither a local path nor a reachable hub id ({error}); download it first"
        ) from error
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"stage C {repository!r}: the repository has no {subfolder}/config.json")
    return folder


def _weights_in_folder(folder: Path) -> list[Path]:
    """Return the plain weights file, else the shards of its index, else the only variant there is."""
    single, index = (folder / f"{DIFFUSERS_WEIGHTS}.safetensors{suffix}" for suffix in ("", ".index.json"))
    if single.is_file():
        return [single]
    if index.is_file():
        names = json.loads(index.read_text("utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
    variants = sorted(folder.glob(f"{DIFFUSERS_WEIGHTS}.*.safetensors"))
    if len(variants) != 1:
        raise FileNotFoundError(
            f"{folder}: expected {single.name}, its index, or exactly one variant; found {[v.name for v in variants]}"
        )
    return variants


def save_stage_c(
    network: StageCNetwork,
    path: Path,
    *,
    layout: Layout = "original",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> WeightsReport:
    """Write stage C and return the report with the counts of values that overflowed or vanished in dtype.

    layout original or kohya: path is one .safetensors file. diffusers: path is a folder that gets config.json and
    diffusion_pytorch_model.safetensors. dtype None keeps each tensor's own. metadata: header entries such as
    modelspec(...); the config is added, so that any number of heads loads again. state_dict (original layout) replaces
    the network's own weights where those are sharded over ranks or an average is to be saved; call on one rank.

    Raises ValueError if the path does not suit the layout, WeightsError if state_dict has other keys than the network.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be one of {get_args(Layout)}, got {layout!r}")
    if (path.suffix == ".safetensors") == (layout == "diffusers"):
        wanted = "a folder" if layout == "diffusers" else "a .safetensors file"
        raise ValueError(f"{path}: layout {layout!r} is written as {wanted}")
    if state_dict is not None:
        with torch.device("meta"):  # where weights are sharded, the network's own may have no shapes
            check_keys(StageCNetwork(network.config).state_dict(), state_dict, source="state_dict to save")
    tensors = from_original(network.state_dict() if state_dict is None else state_dict, layout)
    header = {**(metadata or {}), CONFIG_METADATA_KEY: json.dumps(asdict(network.config), sort_keys=True)}
    if layout != "diffusers":
        return write_tensors(path, tensors, dtype=dtype, metadata=header)
    report = write_tensors(path / f"{DIFFUSERS_WEIGHTS}.safetensors", tensors, dtype=dtype, metadata=header)
    text = json.dumps(config_to_diffusers(network.config), indent=2, sort_keys=True) + "\n"
    (path / "config.json").write_text(text, encoding="utf-8")
    return report
