"""What a run of adapters or tokens gives to other programs, beside or instead of whole weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from training.config import RunConfig
from training.dreambooth.adapters.adapters import SdAdapters
from training.dreambooth.adapters.files import write_adapters
from training.dreambooth.adapters.names import TEXT, TEXT_2, UNET, base_version
from training.dreambooth.single_file.layout import Family
from training.lora.metadata import network_metadata
from training.recipes.base import ExportFile
from training.tokens.files import CLIP_G, CLIP_L, EMB_PARAMS, write_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def export_adapters(
    adapters: SdAdapters,
    folder: Path,
    *,
    config: RunConfig,
    tokenizer: "PreTrainedTokenizerBase",
    family: Family,
    dtype: torch.dtype,
    header: Mapping[str, str],
    weights: Mapping[str, Tensor],
    predicts_v: bool = False,
) -> list[ExportFile]:
    """Write the layouts of `lora.formats` and the tokens. weights: what is trained, by name in the whole model.

    tokenizer: the one that learned the tokens; header: of the run's weights files, with ModelSpec's architecture.
    Raises AdapterError for what a layout cannot hold.
    """
    lora, reports = config.lora, []
    architecture = header["modelspec.architecture"]
    if adapters.tokens is not None:
        keys = {TEXT: CLIP_L, TEXT_2: CLIP_G} if family == "sdxl" else {TEXT: EMB_PARAMS}
        rows = {keys[part]: own for part, own in adapters.token_rows(weights).items()}
        own = {**header, "modelspec.architecture": f"{architecture}/textual-inversion"}
        reports += write_tokens(folder, adapters.tokens, rows, tokenizer=tokenizer, dtype=dtype, metadata=own)
    if lora is not None:
        own = {**header, "modelspec.architecture": f"{architecture}/lora"}
        if config.save.training_facts:
            own |= network_metadata(config, lora, base=base_version(family, predicts_v=predicts_v))
        reports += write_adapters(
            folder, adapters.adapters(weights), family=family, unet_layers=adapters.adaptable_layers()[UNET],
            formats=lora.formats, dtype=dtype, metadata=own,
        )  # fmt: skip
    return [ExportFile(report.path, report.num_overflowed, report.num_vanished) for report in reports]
