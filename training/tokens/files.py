"""Trained tokens as files: one embedding each, as A1111 and ComfyUI read textual inversions, and the tokenizer."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from training.tokens.choose import ChosenTokens
from training.weight_files import WeightsReport, write_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CLIP_L, CLIP_G = "clip_l", "clip_g"
"""Keys of CLIP-L and CLIP bigG in embeddings of SDXL."""
EMB_PARAMS = "emb_params"
"""The one key in embeddings of SD 1 and SD 2."""


def write_tokens(
    folder: Path,
    tokens: ChosenTokens,
    rows: Mapping[str, Tensor],
    *,
    tokenizer: "PreTrainedTokenizerBase",
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> list[WeightsReport]:
    """Write `tokens/NAME.safetensors` with rows {key: (N, width)}, and `tokenizer/`, which knows the new tokens."""
    reports: list[WeightsReport] = []
    for place, (name, number) in enumerate(zip(tokens.names, tokens.ids, strict=True)):
        path = folder / "tokens" / f"{_file_name(name)}.safetensors"
        if any(report.path == path for report in reports):
            path = path.with_stem(f"{path.stem}-{number}")
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {**metadata, "chunkline.token": name, "chunkline.token_id": str(number)}
        own = {key: table[place][None] for key, table in rows.items()}
        reports.append(write_tensors(path, own, dtype=dtype, metadata=header))
    tokenizer.save_pretrained(folder / "tokenizer")
    return reports


def _file_name(token: str) -> str:
    return re.sub(r"[^\w.-]+", "", token.removesuffix("</w>")) or "token"
