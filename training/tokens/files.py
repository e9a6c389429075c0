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

CLIP_G = "clip_g"
"""The key of CLIP bigG in embeddings of SDXL."""


def write_tokens(
    folder: Path,
    tokens: ChosenTokens,
    rows: Tensor,
    *,
    tokenizer: "PreTrainedTokenizerBase",
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> list[WeightsReport]:
    """Write `tokens/NAME.safetensors` with rows (N, width), and `tokenizer/`, which knows the new tokens."""
    reports: list[WeightsReport] = []
    for name, number, row in zip(tokens.names, tokens.ids, rows, strict=True):
        path = folder / "tokens" / f"{_file_name(name)}.safetensors"
        if any(report.path == path for report in reports):
            path = path.with_stem(f"{path.stem}-{number}")
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {**metadata, "chunkline.token": name, "chunkline.token_id": str(number)}
        reports.append(write_tensors(path, {CLIP_G: row[None]}, dtype=dtype, metadata=header))
    tokenizer.save_pretrained(folder / "tokenizer")
    return reports


def _file_name(token: str) -> str:
    return re.sub(r"[^\w.-]+", "", token.removesuffix("</w>")) or "token"
