"""One file with network, text model, encoder and previewer, as ComfyUI's "Load Checkpoint" takes it.

    model.diffusion_model.*                stage C, original layout
    text_encoder.clip_g.transformer.*      CLIP bigG with its projection
    vae.encoder.*  vae.previewer.*         EfficientNet encoder and previewer, always fp32: fp16 overflows there

Reading needs nothing here: `load_stage_c`, `load_text_model`, `load_effnet` and `load_previewer` find their model
behind its prefix. ComfyUI's `clip_l_vision.*` is not written: no image goes into what is trained.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from training.weight_files import WeightsReport, write_tensors

NETWORK_PREFIX = "model.diffusion_model."
TEXT_PREFIX = "text_encoder.clip_g.transformer."
PIXELS_PREFIX = "vae."


def save_combined(
    path: Path,
    *,
    network: Mapping[str, Tensor],
    text: Mapping[str, Tensor],
    effnet: Mapping[str, Tensor] | None = None,
    previewer: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> WeightsReport:
    """Write the file. network: original layout; text: names of CLIPTextModelWithProjection. dtype: of these two.

    Raises DiskFullError, WeightsError if the file cannot be read back.
    """
    parts = {
        NETWORK_PREFIX: network,
        TEXT_PREFIX: text,
        f"{PIXELS_PREFIX}encoder.": effnet or {},
        f"{PIXELS_PREFIX}previewer.": previewer or {},
    }
    tensors = {f"{prefix}{key}": value for prefix, part in parts.items() for key, value in part.items()}
    return write_tensors(path, tensors, dtype=dtype, keep_dtype=PIXELS_PREFIX, metadata=metadata)
