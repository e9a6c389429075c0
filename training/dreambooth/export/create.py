"""The wiki's "Create Model": a model of any form, written as a diffusers folder that training and others start from."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from training.dreambooth.export.content import SdWeights
from training.dreambooth.export.export import write_folder
from training.dreambooth.export.header import markers_of, sd_modelspec
from training.dreambooth.export.verify import verify_export
from training.dreambooth.sd_models.file_parts import has_average
from training.dreambooth.sd_models.folders import AVERAGE_FOLDER
from training.dreambooth.sd_models.merged import merged_from
from training.dreambooth.sd_models.models import SdModel, load_average, load_sd
from training.dreambooth.sd_models.prediction import PredictionType
from training.dreambooth.single_file.reading import open_single_file
from training.exports import write_export
from training.recipes.base import ExportFile
from training.stage_c.text import load_tokenizer

Average = Literal["both", "ema", "plain"]


@dataclass(frozen=True)
class Source:
    """A loaded model and what becomes of its running average. average: what of it is written."""

    model: SdModel
    average: Average

    def facts(self) -> list[str]:
        """Return what there is to know before it is trained, a line each."""
        model, merged = self.model, merged_from(self.model)
        prediction = model.prediction
        averages = {
            "both": f"beside the plain UNet, in {AVERAGE_FOLDER}/",
            "ema": "as the UNet",
            "plain": "not written",
        }
        lines = [
            f"family: {model.family}",
            f"predicts: {prediction.kind}{', zero terminal SNR' if prediction.zero_terminal_snr else ''}"
            f" ({prediction.said_by})",
            f"markers: {', '.join(markers_of(model)) or 'none'}",
            f"running average (EMA): {averages[self.average]}",
            f"VAE: {'its own' if model.has_own_vae else 'the given one'}",
            "layers: all are trained of the parts that dreambooth.train names; there is nothing to unfreeze",
        ]
        if merged is not None:
            lines.append(f"warning: a merge of other models? {merged}; the wiki advises to train on original ones")
        return lines


def open_source(
    path_or_id: str,
    *,
    average: Average | None = None,
    vae: str | None = None,
    prediction: PredictionType | None = None,
) -> Source:
    """Load a model of any form. average: default is both where the source holds one, else plain.

    Raises FileNotFoundError, WeightsError, also when there is no average and one is asked for.
    """
    model = load_sd(path_or_id, extract_ema=average == "ema", vae=vae, prediction=prediction)
    return Source(model, average or ("both" if _holds_average(model) else "plain"))


def create_model(source: Source, folder: Path, *, dtype: torch.dtype) -> list[ExportFile]:
    """Write a diffusers folder, read it back, and only then give it its name.

    Raises ValueError when the folder holds something, ExportMismatchError, DiskFullError.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: is not empty; name a new folder")
    model = source.model
    folder_there = Path(model.name).is_dir()
    average = load_average(model).state_dict() if source.average == "both" else None
    tokenizer = load_tokenizer(model.name if folder_there else "builtin")
    content = SdWeights(model, tokenizer, average=average)
    said = {key: model.metadata.get(f"modelspec.{key}", "") for key in ("license", "merged_from")}
    header = sd_modelspec(model, title=folder.name, extra={key: text for key, text in said.items() if text})
    card = {"tags": ["merge"]} if merged_from(model) is not None else {}

    def write(partial: Path) -> Iterable[ExportFile]:
        file = write_folder(content, partial, dtype=dtype, title=folder.name, header=header, card=card)
        verify_export([file], content, dtype=dtype)
        return [file]

    return write_export(folder, write)


def _holds_average(model: SdModel) -> bool:
    if model.source is None:
        return (Path(model.name) / AVERAGE_FOLDER).is_dir()
    with open_single_file(model.source) as file:
        return has_average(file)
