"""Image conditioning of stage C: a picture's CLIP ViT-L/14 embedding, from the pixels that are trained.

The picture is made 224 pixels on its shorter side, cut to the middle square and normalised, as the official training
code does. Loads transformers folders, hub ids and bare weight files.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from training.chunk_data import Batch
from training.config.stage_c import StageCConfig
from training.randomness import uniform
from training.stage_c.hub import load_component
from training.tensor_file import digest_of_tensors
from training.weight_files import WeightsError, load_into, read_tensors

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
ANCHOR = "vision_model.embeddings.patch_embedding.weight"
HEAD_WIDTH = 64
"""Of every CLIP image model up to L; a bare file does not tell."""


class ImageConditioning:
    """The frozen image model of a run, fp32, and whose pictures it is shown. Nothing is loaded when it is nobody's."""

    def __init__(self, settings: StageCConfig, *, device: torch.device) -> None:
        self._fraction = settings.image_embedding_fraction
        self._device = device
        self._model: CLIPVisionModelWithProjection | None = None
        if settings.image_encoder is not None:
            self._model = load_image_model(settings.image_encoder).to(device).requires_grad_(False)

    @property
    def is_used(self) -> bool:
        """Whether any picture is shown."""
        return self._model is not None

    @property
    def width(self) -> int:
        """Channels of an embedding."""
        assert self._model is not None
        return int(self._model.config.projection_dim)

    def digests(self) -> dict[str, str]:
        """Return a SHA-256 of the weights, by config key."""
        return {"stage_c.image_encoder": digest_of_tensors(self._model.state_dict())} if self._model is not None else {}

    @torch.no_grad()
    def embeddings(self, batch: Batch) -> Tensor | None:
        """Return (B, width) float32 of a batch's images: zeros but for the share whose number comes up.

        None when no embeddings are used.
        """
        if self._model is None:
            return None
        identities, images = batch.identities, batch.images
        assert images is not None  # the settings refuse latents made ahead with it
        slots = [n for n, one in enumerate(identities) if uniform(one, "image embedding") < self._fraction]
        embeddings = torch.zeros(len(identities), self.width, device=self._device)
        if slots:
            embeddings[slots] = embed(self._model, images[slots].to(self._device).float() / 255)
        return embeddings


@torch.no_grad()
def embed(model: "CLIPVisionModelWithProjection", rgb: Tensor) -> Tensor:
    """Return embeddings (B, width) float32 of rgb: (B, 3, H, W) in [0, 1]. Autocast is switched off inside."""
    with torch.autocast(rgb.device.type, enabled=False):
        embeddings: Tensor = model(pixel_values=clip_pixels(rgb.float(), int(model.config.image_size))).image_embeds
        return embeddings


def clip_pixels(rgb: Tensor, size: int) -> Tensor:
    """Return (B, 3, size, size) normalised pixels: shorter side to size (bicubic, antialiased), middle square."""
    height, width = rgb.shape[2:]
    scale = size / min(height, width)
    resized = (max(size, int(height * scale)), max(size, int(width * scale)))
    small = F.interpolate(rgb, resized, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = ((side - size) // 2 for side in resized)
    square = small[:, :, top : top + size, left : left + size]
    mean, std = (square.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (square - mean) / std


def load_image_model(path_or_id: str | Path) -> "CLIPVisionModelWithProjection":
    """Load CLIPVisionModelWithProjection in fp32 from a folder, a hub id or a bare weights file, in evaluation mode.

    A hub id or folder of a whole pipeline is read from its `image_encoder/`; a whole CLIP
    (`openai/clip-vit-large-patch14`) gives its image half. The shape of a bare file comes from its tensors: heads of 64
    and quick GELU, right for OpenAI's CLIP.

    Raises FileNotFoundError if nothing is there, WeightsError if keys do not fit.
    """
    from transformers import CLIPVisionModelWithProjection

    path = Path(path_or_id)
    if path.is_file():
        return _load_bare_file(path)
    try:
        model, info = load_component(
            CLIPVisionModelWithProjection.from_pretrained, path_or_id, "image_encoder", file_name="config.json",
            dtype=torch.float32, output_loading_info=True,
        )  # fmt: skip
    except FileNotFoundError:
        raise
    except OSError as error:
        raise FileNotFoundError(f"image model {str(path_or_id)!r}: could not be loaded ({error})") from error
    problems = {key: sorted(map(str, info[key])) for key in ("missing_keys", "mismatched_keys") if info[key]}
    if problems:
        raise WeightsError(f"image model {str(path_or_id)!r}: {problems}; these weights would be random")
    return model.eval()


def _load_bare_file(path: Path) -> "CLIPVisionModelWithProjection":
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    everything, _ = read_tensors(path, anchor=ANCHOR, dtype=torch.float32)
    state_dict = {key: value for key, value in everything.items() if is_of_image_model(key)}
    with torch.device("meta"):
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(**config_from_shapes(state_dict, path)))
    load_into(model, state_dict, source=path)
    # The only buffer is not part of the file, so loading leaves it on the meta device.
    embeddings = model.vision_model.embeddings
    embeddings.position_ids = torch.arange(embeddings.num_positions)[None]
    return model.eval()


def is_of_image_model(key: str) -> bool:
    """Tell whether a key of a file that may hold all of CLIP is a weight of the image half."""
    return key.startswith(("vision_model.", "visual_projection.")) and not key.endswith("position_ids")


def config_from_shapes(state_dict: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Return the values of a CLIPVisionConfig. Raises WeightsError naming a key that is missing."""
    try:
        hidden, _, patch, _ = state_dict[ANCHOR].shape
        positions = state_dict["vision_model.embeddings.position_embedding.weight"].shape[0]
        intermediate = state_dict["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0]
        projection = state_dict["visual_projection.weight"].shape[0]
    except KeyError as error:
        raise WeightsError(f"{path}: key {error.args[0]!r} is missing; a CLIP image model is needed") from None
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": sum(key.endswith("mlp.fc1.weight") for key in state_dict),
        "num_attention_heads": max(1, hidden // HEAD_WIDTH),
        "image_size": round((positions - 1) ** 0.5) * patch,
        "patch_size": patch,
        "projection_dim": projection,
        "hidden_act": "quick_gelu",
    }
