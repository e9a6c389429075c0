"""Stage C's networks without their weights: real classes and real shapes, read from the headers of weight files.

Nothing is downloaded. Where a file is not here, the published model is assumed and said so.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from training.config import RunConfig
from training.config.latents import needs_text_model
from training.memory.stage_c_networks import StageCNetworks
from training.stage_c.effnet import EffNetConfig
from training.stage_c.effnet import config_from_state_dict as effnet_config_from
from training.stage_c.formats import file_in_folder
from training.stage_c.layouts import ANCHOR, to_original
from training.stage_c.network import StageCConfig, config_from_state_dict
from training.stage_c.network_config import config_from_diffusers, config_from_metadata
from training.stage_c.text import BOS_ID, EOS_ID
from training.stage_c.text_files import ANCHOR as TEXT_ANCHOR
from training.stage_c.text_files import CONFIG_METADATA_KEY as TEXT_CONFIG_METADATA_KEY
from training.stage_c.text_files import text_file_in_folder
from training.weight_files import TORCH_SUFFIXES, locate_component

if TYPE_CHECKING:
    from transformers import CLIPTextConfig

EFFNET_ANCHOR = "mapper.0.weight"
CLIP_BIGG: dict[str, Any] = {
    "vocab_size": 49408, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
    "num_attention_heads": 20, "max_position_embeddings": 77, "projection_dim": 1280, "hidden_act": "gelu",
    "bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": EOS_ID,
}  # fmt: skip
"""The text model of Stable Cascade, 694,659,840 parameters."""
CLIP_L_PARAMETERS = 303_966_208
"""Of CLIP ViT-L/14's image half with its projection."""


@dataclass(frozen=True)
class StageCArchitecture:
    """Shapes of everything that is in memory while stage C is trained."""

    network: StageCConfig
    text: "CLIPTextConfig"
    effnet: EffNetConfig
    train_text_encoder: bool
    has_effnet: bool = True
    """Not where latents are made ahead."""
    has_text: bool = True
    """Not where the text model's outputs are made ahead and no preview is drawn."""
    image_parameters: int = 0
    """Of the frozen CLIP image model; 0 where no picture is shown to the network."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameters that are not trained."""
    adapters: RunConfig | None = None
    """The settings, where they have [lora] or [tokens]."""
    dropout: float = 0.1
    attention_dropout: Literal["probabilities", "output", "none"] = "probabilities"
    assumed: tuple[str, ...] = ()
    """What was not found here and is taken for the published model."""

    def key(self) -> str:
        """Return what passes through the networks depend on, besides the shapes of what is trained."""
        return repr(replace(self, assumed=(), adapters=None))

    def networks(self) -> StageCNetworks:
        """Return the networks. Under a meta device they take no memory."""
        return StageCNetworks(self)


def stage_c_architecture(config: RunConfig) -> StageCArchitecture:
    """Return the architecture of a run of stage C. Raises WeightsError or ValueError for a file of another kind."""
    settings = config.of_stage_c
    assumed: list[str] = []
    network = _network_config(settings.network)
    if network is None:
        is_lite = "lite" in settings.network
        network = StageCConfig.lite() if is_lite else StageCConfig.large()
        assumed.append(f"stage_c.network {settings.network} (taken for the {'1.0' if is_lite else '3.6'} B model)")
    text = _text_config(settings.text_encoder)
    if text is None:
        from transformers import CLIPTextConfig

        text = CLIPTextConfig(**CLIP_BIGG)
        assumed.append(f"stage_c.text_encoder {settings.text_encoder} (taken for CLIP bigG)")
    effnet = EffNetConfig()
    if Path(settings.effnet).is_file():
        effnet = effnet_config_from(read_shapes(Path(settings.effnet), anchor=EFFNET_ANCHOR)[0])
    else:
        assumed.append(f"stage_c.effnet {settings.effnet} (taken for EfficientNetV2-S)")
    num_image = 0
    if settings.image_encoder is not None:
        num_image = _image_parameters(settings.image_encoder) or CLIP_L_PARAMETERS
    return StageCArchitecture(
        network, text, effnet, settings.train_text_encoder, has_effnet=not config.latents.use,
        has_text=needs_text_model(config), image_parameters=num_image, freeze=config.optimizer.freeze,
        adapters=config if config.lora is not None or config.tokens is not None else None, dropout=settings.dropout,
        attention_dropout=settings.attention_dropout, assumed=tuple(assumed),
    )  # fmt: skip


def read_shapes(path: Path, *, anchor: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a weights file's tensors on the meta device, behind the prefix of `anchor`, and its metadata."""
    if path.suffix in TORCH_SUFFIXES:
        loaded = torch.load(path, map_location="meta", weights_only=True, mmap=True)
        tensors, metadata = loaded.get("state_dict", loaded), {}
    else:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in list(file.keys())}
    ends = [key for key in tensors if key == anchor or key.endswith(f".{anchor}")]
    if not ends:
        raise ValueError(f"{path}: no key {anchor!r}, so this is a file of another model")
    prefix = min(ends, key=len).removesuffix(anchor)
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}, metadata


def _network_config(path_or_id: str) -> StageCConfig | None:
    path = file_in_folder(Path(path_or_id))
    if path.is_dir():
        folder = Path(locate_component(path, "prior", file_name="config.json")[0])
        published = json.loads((folder / "config.json").read_text("utf-8"))
        return config_from_diffusers(published, source=folder / "config.json")
    if not path.is_file():
        return None
    shapes, metadata = read_shapes(path, anchor=ANCHOR)
    return config_from_metadata(metadata, source=path) or config_from_state_dict(to_original(shapes))


def _text_config(path_or_id: str) -> "CLIPTextConfig | None":
    from transformers import CLIPTextConfig

    path = text_file_in_folder(Path(path_or_id))
    if path.is_dir():
        folder = locate_component(path, "text_encoder", file_name="config.json")[0]
        config: CLIPTextConfig = CLIPTextConfig.from_pretrained(folder)
        return config
    if not path.is_file():
        return None
    text = read_shapes(path, anchor=TEXT_ANCHOR)[1].get(TEXT_CONFIG_METADATA_KEY)
    return CLIPTextConfig(**(json.loads(text) if text is not None else CLIP_BIGG))


def _image_parameters(path_or_id: str) -> int | None:
    from training.stage_c.image import ANCHOR as IMAGE_ANCHOR
    from training.stage_c.image import is_of_image_model

    path = Path(path_or_id)
    if path.is_dir():
        path = Path(locate_component(path, "image_encoder", file_name="config.json")[0]) / "model.safetensors"
    if not path.is_file():
        return None
    shapes = read_shapes(path, anchor=IMAGE_ANCHOR)[0]
    return sum(value.numel() for key, value in shapes.items() if is_of_image_model(key))
