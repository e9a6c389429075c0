"""What a run of adapters or tokens gives to other programs, beside or instead of whole weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from training.config import RunConfig
from training.lora.metadata import network_metadata
from training.recipes.base import ExportFile
from training.stage_c.adapter_files import write_adapters
from training.stage_c.adapters import StageCAdapters
from training.tokens.files import CLIP_G, write_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BASE_MODEL_VERSION = "stable_cascade"  # kohya's name of it


def export_adapters(
    adapters: StageCAdapters,
    folder: Path,
    *,
    config: RunConfig,
    tokenizer: "PreTrainedTokenizerBase",
    dtype: torch.dtype,
    header: Mapping[str, str],
    weights: Mapping[str, Tensor],
) -> list[ExportFile]:
    """Write the layouts of `lora.formats` and the tokens. weights: what is trained, by name in the whole model.

    Raises AdapterError for what a layout cannot hold.
    """
    lora, reports = config.lora, []
    tokens: tuple[tuple[int, ...], Tensor] = ((), torch.zeros(0, adapters.text_width))
    if adapters.tokens is not None:
        tokens = (adapters.tokens.ids, adapters.token_changes(weights))
        own = {**header, "modelspec.architecture": "stable-cascade/textual-inversion"}
        rows = {CLIP_G: adapters.token_rows(weights)}
        reports += write_tokens(folder, adapters.tokens, rows, tokenizer=tokenizer, dtype=dtype, metadata=own)
    if lora is not None:
        own = {**header, "modelspec.architecture": "stable-cascade/lora"}
        own |= network_metadata(config, lora, base=BASE_MODEL_VERSION) if config.save.training_facts else {}
        reports += write_adapters(
            folder, adapters.adapters(weights), formats=lora.formats, order=adapters.module_order(), dtype=dtype,
            metadata=own, tokens=tokens,
        )  # fmt: skip
    return [ExportFile(report.path, report.num_overflowed, report.num_vanished) for report in reports]
