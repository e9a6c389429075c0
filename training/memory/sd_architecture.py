"""Stable Diffusion's networks without their weights: settings read from the files of a run, or the published ones.

Of weight files the headers are read only (of .ckpt files all of it: they have none). Nothing is downloaded: where a
model is not here, the published model of that name is assumed and said so.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from training.config import RunConfig
from training.config.dreambooth import PartName
from training.dreambooth.sd_models.shapes import detect_family, text_settings, unet_settings, vae_settings
from training.dreambooth.single_file.layout import TEXT_PREFIXES, Family
from training.dreambooth.single_file.reading import open_single_file
from training.memory.sd_networks import SdNetworksOnMeta
from training.stages import stage_config, stages_of

Settings = Mapping[str, Any]
_ATTENDED = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
_SD1_BLOCKS = {
    "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2,
    "down_block_types": (*(_ATTENDED[0],) * 3, "DownBlock2D"), "up_block_types": ("UpBlock2D", *(_ATTENDED[1],) * 3),
}  # fmt: skip
PUBLISHED_UNETS: Mapping[Family, Settings] = {
    "sd1": {**_SD1_BLOCKS, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {
        **_SD1_BLOCKS, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (320, 640, 1280), "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", *(_ATTENDED[0],) * 2),
        "up_block_types": (*(_ATTENDED[1],) * 2, "UpBlock2D"), "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20), "use_linear_projection": True, "transformer_layers_per_block": (1, 2, 10),
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip
"""859,520,964, 865,910,724 and 2,567,463,684 parameters."""
PUBLISHED_VAE: Settings = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
"""83,653,863 parameters."""


def _clip(width: int, inner: int, layers: int, heads: int, projection: int, act: str = "gelu") -> Settings:
    return {
        "vocab_size": 49408, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "max_position_embeddings": 77, "projection_dim": projection, "hidden_act": act,
        "bos_token_id": 49406, "eos_token_id": 49407,
    }  # fmt: skip


_CLIP_L, _OPENCLIP_H = _clip(768, 3072, 12, 12, 768, "quick_gelu"), _clip(1024, 4096, 23, 16, 1024)
PUBLISHED_TEXTS: Mapping[Family, tuple[Settings, ...]] = {
    "sd1": (_CLIP_L,), "sd2": (_OPENCLIP_H,), "sdxl": (_CLIP_L, _clip(1280, 5120, 32, 20, 1280)),
}  # fmt: skip
"""123,060,480, 340,387,840, and 123,060,480 with 694,659,840 parameters."""
_NAMES: Mapping[Family, tuple[str, ...]] = {
    "sdxl": ("xl", "pony", "illustrious", "noob", "animagine"),
    "sd2": ("stable-diffusion-2", "v2-1", "v2-base", "sd2", "sd-2", "768-v", "diffusion-1-5", "waifu-diffusion-v1-5"),
}
"""What published models' names have in them; all others are taken for SD 1."""


@dataclass(frozen=True)
class SdArchitecture:
    """Shapes of everything that is in memory while Stable Diffusion is trained."""

    family: Family
    unet: Settings
    """What diffusers' UNet2DConditionModel is made with."""
    vae: Settings
    """The same of AutoencoderKL."""
    texts: tuple[Settings, ...]
    """The same of transformers' CLIPTextConfig, one each."""
    train: tuple[PartName, ...] = ("unet",)
    """Parts that are trained at once: those of the stage that trains most."""
    text_has_gradients: bool = False
    """In this stage or another: the text models are then in the trained module."""
    clip_skip: int = 1
    attention: str = "sdpa"
    vae_dtype: str = "fp32"
    encodes_pixels: bool = True
    """Not where latents are made ahead."""
    encodes_text: bool = True
    """Not where the text models' outputs are made ahead."""
    keeps_base: bool = False
    """A frozen copy of what is trained, for `prior_target = "base_model"`."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameters that are not trained."""
    freeze_clip_norms: bool = False
    adapters: RunConfig | None = None
    """The settings, where they have [lora] or [tokens]."""
    assumed: tuple[str, ...] = ()
    """What was not found here and is taken for the published model."""

    def key(self) -> str:
        """Return what passes through the networks depend on, besides the shapes of what is trained."""
        return repr(replace(self, assumed=(), adapters=None))

    def networks(self) -> SdNetworksOnMeta:
        """Return the networks. Under a meta device they take no memory."""
        return SdNetworksOnMeta(self)


def sd_architecture(config: RunConfig) -> SdArchitecture:
    """Return the architecture of a DreamBooth run. Raises WeightsError or ValueError for a file of another kind."""
    config = largest_stage(config)
    settings = config.of_dreambooth
    family, unet, vae, texts, is_here = _parts(settings.model)
    named = {"sd1": "SD 1.5", "sd2": "SD 2.1", "sdxl": "SDXL"}[family]
    assumed = () if is_here else (f"dreambooth.model {settings.model} (taken for {named})",)
    return SdArchitecture(
        family, unet, vae, texts, settings.train, text_has_gradients=config.trains_in_text_encoder,
        clip_skip=settings.clip_skip, attention=settings.attention, vae_dtype=settings.vae_dtype,
        encodes_pixels=not config.latents.use, encodes_text=not config.latents.text,
        keeps_base=settings.prior_target == "base_model" and config.lora is None, freeze=config.optimizer.freeze,
        freeze_clip_norms=settings.freeze_clip_norms,
        adapters=config if config.lora is not None or config.tokens is not None else None, assumed=assumed,
    )  # fmt: skip


def largest_stage(config: RunConfig) -> RunConfig:
    """Return the settings of the stage that trains most at once; a UNet is more than any text encoder."""
    stages, train = stages_of(config), config.of_dreambooth.train
    if not stages:
        return config
    parts = {stage.chunk: stage.values.train or train for stage in stages}
    return stage_config(config, max(parts, key=lambda chunk: ("unet" in parts[chunk], len(parts[chunk]))))


def family_of_name(name: str) -> Family:
    """Return the family that a published model's name, path or hub id speaks of."""
    lowered = name.lower()
    for family in ("sd2", "sdxl"):
        if any(part in lowered for part in _NAMES[family]):
            return family
    return "sd1"


def family_of_model(path_or_id: str) -> tuple[Family, bool]:
    """Return a model's family, and whether it is here; else the name tells. Raises WeightsError for other models."""
    family, *_, is_here = _parts(path_or_id)
    return family, is_here


def _parts(path_or_id: str) -> tuple[Family, Settings, Settings, tuple[Settings, ...], bool]:
    path = Path(path_or_id)
    if path.is_dir():
        return _of_folder(path)
    if path.is_file():
        return _of_file(path)
    family = family_of_name(path_or_id)
    return family, PUBLISHED_UNETS[family], PUBLISHED_VAE, PUBLISHED_TEXTS[family], False


def _of_folder(path: Path) -> tuple[Family, Settings, Settings, tuple[Settings, ...], bool]:
    def read(part: str) -> dict[str, Any]:
        file = path / part / "config.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; dreambooth.model takes a whole diffusers folder")
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return {key: value for key, value in values.items() if not key.startswith("_")}

    unet = read("unet")
    is_sdxl = unet.get("addition_embed_type") == "text_time"
    family: Family = "sdxl" if is_sdxl else "sd2" if unet.get("use_linear_projection") else "sd1"
    texts = [read("text_encoder"), *([read("text_encoder_2")] if is_sdxl else [])]
    return family, unet, read("vae"), tuple(texts), True


def _of_file(path: Path) -> tuple[Family, Settings, Settings, tuple[Settings, ...], bool]:
    with open_single_file(path) as file:
        shapes = file.shapes
    family = detect_family(shapes, name=str(path))
    texts = [text_settings(shapes, prefix, skips_last_layer=family == "sd2") for prefix, _ in TEXT_PREFIXES[family]]
    return family, unet_settings(shapes, family), vae_settings(shapes, family), tuple(texts), True
