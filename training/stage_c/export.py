"""What a run of stage C gives to other programs: the formats in `save.export_formats`, one after another.

    original   stage_c.safetensors, text_model.safetensors when it was trained: ComfyUI, kohya, Stability's code;
               stage_c_config/config.json for diffusers' from_single_file(…, config=…) without a network
    combined   combined.safetensors: ComfyUI's "Load Checkpoint"
    diffusers  diffusers/: a StableCascadePriorPipeline

Every weights file is read again and compared before it gets its name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sharding.files import write_json
from training.config.saving import SaveConfig
from training.exports import copy_licences
from training.recipes.base import ExportFile
from training.stage_c.combined_file import save_combined
from training.stage_c.decoder_folder import copy_decoder
from training.stage_c.effnet import EffNetEncoder
from training.stage_c.formats import EXPORT_FILE, save_stage_c
from training.stage_c.model_card import write_model_card
from training.stage_c.network import StageCNetwork
from training.stage_c.network_config import config_to_diffusers, config_to_metadata
from training.stage_c.previewer import Previewer
from training.stage_c.prior_folder import write_prior_folder
from training.stage_c.text_files import EXPORT_FILE as TEXT_FILE
from training.stage_c.text_files import config_to_metadata as text_config_to_metadata
from training.stage_c.text_files import save_text_model
from training.weight_files import WeightsReport

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerBase

COMBINED_FILE = "combined.safetensors"
CONFIG_FOLDER = "stage_c_config"
DIFFUSERS_FOLDER = "diffusers"
DECODER_FOLDER = "diffusers-decoder"
PUBLISHED_DECODER = "stabilityai/stable-cascade"


@dataclass(frozen=True)
class StageCWeights:
    """What is exported. Tensors that are None are the module's own; else those of a sharded or averaged model."""

    network: StageCNetwork
    text_model: "CLIPTextModelWithProjection | None"
    """None is enough for the format original."""
    tokenizer: "PreTrainedTokenizerBase"
    text_is_trained: bool
    """The format original holds the text model, too."""
    network_tensors: Mapping[str, Tensor] | None = None
    """Original layout."""
    text_tensors: Mapping[str, Tensor] | None = None
    effnet: EffNetEncoder | None = None
    previewer: Previewer | None = None

    @property
    def of_network(self) -> Mapping[str, Tensor]:
        return self.network.state_dict() if self.network_tensors is None else self.network_tensors

    @property
    def text(self) -> "tuple[CLIPTextModelWithProjection, Mapping[str, Tensor]]":
        """The text model and its tensors. Raises ValueError when there is none."""
        if self.text_model is None:
            raise ValueError("this format holds the text model, too, and none came with the weights: --text-encoder")
        return self.text_model, self.text_model.state_dict() if self.text_tensors is None else self.text_tensors


def export_stage_c(
    weights: StageCWeights,
    folder: Path,
    *,
    save: SaveConfig,
    dtype: torch.dtype | None,
    title: str,
    header: Mapping[str, str],
) -> list[ExportFile]:
    """Write the formats of `save.export_formats` and return their files, with the values that did not fit dtype.

    header: entries of every weights file's metadata. dtype: None keeps each tensor's own.
    Raises WeightsError, DiskFullError.
    """
    files: list[ExportFile] = []
    if "original" in save.export_formats:
        files += _original(weights, folder, dtype, header)
    if "combined" in save.export_formats:
        files.append(_combined(weights, folder, dtype, header))
    if "diffusers" in save.export_formats:
        files += _diffusers(weights, folder / DIFFUSERS_FOLDER, save, dtype, title, header)
    return files


def copy_decoder_beside(folder: Path, base: str, save: SaveConfig, *, title: str, old: bool) -> Path:
    """Copy a decoder pipeline beside the diffusers prior of an export, linked to it; return its folder.

    Without `save.hub_prior` the link is the prior's path here. old: for diffusers 0.35 to 0.37.
    """
    target = folder / DECODER_FOLDER
    copy_decoder(
        base,
        target,
        title=f"{title}, decoder",
        name=save.hub_decoder or str(target.resolve()),
        prior=save.hub_prior or str((folder / DIFFUSERS_FOLDER).resolve()),
        front={"pipeline_tag": "text-to-image", **save.model_card},
        for_old_diffusers=old,
    )
    copy_licences(save.licence_files, target)
    return target


def _original(
    weights: StageCWeights, folder: Path, dtype: torch.dtype | None, header: Mapping[str, str]
) -> list[ExportFile]:
    reports = [
        save_stage_c(
            weights.network, folder / EXPORT_FILE, dtype=dtype, metadata=header, state_dict=weights.network_tensors
        )
    ]
    (folder / CONFIG_FOLDER).mkdir(exist_ok=True)
    write_json(folder / CONFIG_FOLDER / "config.json", config_to_diffusers(weights.network.config))
    if weights.text_is_trained:
        text_model, tensors = weights.text
        reports.append(save_text_model(text_model, folder / TEXT_FILE, dtype=dtype, state_dict=tensors))
    return [_file(report) for report in reports]


def _combined(weights: StageCWeights, folder: Path, dtype: torch.dtype | None, header: Mapping[str, str]) -> ExportFile:
    text_model, text = weights.text
    metadata = {**header, **config_to_metadata(weights.network.config), **text_config_to_metadata(text_model)}
    report = save_combined(
        folder / COMBINED_FILE,
        network=weights.of_network,
        text=text,
        effnet=weights.effnet.state_dict() if weights.effnet is not None else None,
        previewer=weights.previewer.state_dict() if weights.previewer is not None else None,
        dtype=dtype,
        metadata=metadata,
    )
    return _file(report)


def _diffusers(
    weights: StageCWeights,
    folder: Path,
    save: SaveConfig,
    dtype: torch.dtype | None,
    title: str,
    header: Mapping[str, str],
) -> list[ExportFile]:
    text_model, text_tensors = weights.text
    decoder = save.hub_decoder or PUBLISHED_DECODER
    write_model_card(
        folder / "README.md",
        title=title,
        front={"pipeline_tag": "text-to-image", **save.model_card, "decoder": [decoder]},
        facts=[f"{key.partition('.')[2]}: {value}" for key, value in header.items() if key.startswith("chunkline.")],
        decoder=decoder,
    )
    reports = write_prior_folder(
        folder,
        network=weights.network,
        network_tensors=weights.of_network,
        text_model=text_model,
        text_tensors=text_tensors,
        tokenizer=weights.tokenizer,
        dtype=dtype,
        metadata=header,
    )
    return [_file(report) for report in reports]


def _file(report: WeightsReport) -> ExportFile:
    return ExportFile(report.path, report.num_overflowed, report.num_vanished)
