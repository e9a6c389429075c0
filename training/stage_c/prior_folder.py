"""The folder of a StableCascadePriorPipeline: what diffusers, SD.Next and others call a model.

    model_index.json   README.md   prior/   text_encoder/   tokenizer/   scheduler/

model_index.json is written last, so that a folder without it was cut short.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sharding.files import write_json
from training.stage_c.clip_vocabulary import write_slow_tokenizer_files
from training.stage_c.formats import save_stage_c
from training.stage_c.network import StageCNetwork
from training.stage_c.text_files import save_text_model
from training.weight_files import WeightsReport

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerBase

MODEL_INDEX = "model_index.json"
RESOLUTION_MULTIPLE = 42.67
"""Pixels of the picture per latent. Always the published one: the decoder's `latent_dim_scale` belongs to it."""
SCHEDULER = {"_class_name": "DDPMWuerstchenScheduler", "s": 0.008, "scaler": 1.0}
_HOW_LOADED = ("is_local", "local_files_only", "name_or_path")
_INDEX: dict[str, Any] = {
    "_class_name": "StableCascadePriorPipeline",
    "_diffusers_version": "0.27.0",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "prior": ["diffusers", "StableCascadeUNet"],
    "resolution_multiple": RESOLUTION_MULTIPLE,
    "scheduler": ["diffusers", "DDPMWuerstchenScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
}


def write_prior_folder(
    folder: Path,
    *,
    network: StageCNetwork,
    network_tensors: Mapping[str, Tensor],
    text_model: "CLIPTextModelWithProjection",
    text_tensors: Mapping[str, Tensor],
    tokenizer: "PreTrainedTokenizerBase",
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
) -> list[WeightsReport]:
    """Write all but the README. network_tensors: original layout. Returns one report per weights file."""
    (folder / MODEL_INDEX).unlink(missing_ok=True)
    reports = [
        save_stage_c(
            network, folder / "prior", layout="diffusers", dtype=dtype, state_dict=network_tensors, metadata=metadata
        ),
        save_text_model(text_model, folder / "text_encoder", dtype=dtype, state_dict=text_tensors),
    ]
    write_tokenizer(tokenizer, folder / "tokenizer")
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(folder / MODEL_INDEX, _INDEX)
    return reports


def write_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Write a tokenizer so that transformers 4 and 5 read it, with the tokens that were added to it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    # How the tokenizer was loaded here is no property of it.
    write_json(folder / "tokenizer_config.json", {key: settings[key] for key in settings if key not in _HOW_LOADED})
    saved = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    added = {token["content"]: token["id"] for token in saved["added_tokens"]}
    write_slow_tokenizer_files(folder, saved["model"]["vocab"], saved["model"]["merges"], added)
