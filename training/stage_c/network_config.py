"""The shape of stage C as JSON: diffusers' config.json, and an entry in the metadata of our files."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from training.stage_c.network import StageCConfig
from training.weight_files import WeightsError

CONFIG_METADATA_KEY = "chunkline.stage_c_config"


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


def config_to_metadata(config: StageCConfig) -> dict[str, str]:
    """Return the header entry that makes a file load again with any number of heads."""
    return {CONFIG_METADATA_KEY: json.dumps(asdict(config), sort_keys=True)}


def config_from_metadata(metadata: Mapping[str, str], *, source: Path) -> StageCConfig | None:
    """Return the config that a file's header names; None without one. Raises WeightsError if it is not one."""
    text = metadata.get(CONFIG_METADATA_KEY)
    if text is None:
        return None
    try:
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in json.loads(text).items()
        }
        return StageCConfig(**values)
    except (json.JSONDecodeError, TypeError) as error:
        raise WeightsError(f"{source}: metadata {CONFIG_METADATA_KEY!r} is not a config ({error}); pass one") from error
