"""Weights that somebody gives us, in any layout, with the text model and tokenizer that belong to them."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from training.stage_c.export import COMBINED_FILE, DIFFUSERS_FOLDER
from training.stage_c.formats import EXPORT_FILE, load_stage_c
from training.stage_c.network import StageCNetwork
from training.stage_c.text import load_tokenizer
from training.stage_c.text_files import ANCHOR as TEXT_ANCHOR
from training.stage_c.text_files import EXPORT_FILE as TEXT_FILE
from training.stage_c.text_files import load_text_model, text_file_in_folder
from training.weight_files import WeightsError, open_weights

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerBase


@dataclass(frozen=True)
class GivenWeights:
    """Stage C and its text model, on the CPU, in evaluation mode. has_own_text: it came with the weights."""

    network: StageCNetwork
    text_model: "CLIPTextModelWithProjection | None"
    has_own_text: bool
    tokenizer: "PreTrainedTokenizerBase"


def load_given(
    path_or_id: str | Path,
    *,
    text_encoder: str | None = None,
    tokenizer: str | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> GivenWeights:
    """Load stage C from a file, a folder or a hub id, see `load_stage_c`, and the text model that comes with it.

    text_encoder: taken where none comes with the weights; of a text model beside or in them it gives the config.
    tokenizer: the same; at last CLIP's own. dtype: None keeps the number formats of the weights.
    Raises FileNotFoundError, WeightsError, also when the text model belongs to another network.
    """
    network = load_stage_c(path_or_id, dtype=dtype).eval()
    own = find_text_model(path_or_id)
    found = own or text_encoder
    text_model = _load_text(found, dtype, text_encoder) if found is not None else None
    width = text_model.config.hidden_size if text_model is not None else None
    if width not in (None, network.config.c_clip_text):
        raise WeightsError(
            f"{found} gives states of width {width}, {path_or_id} expects {network.config.c_clip_text}: "
            "they do not belong together"
        )
    folder = Path(path_or_id)
    has_tokenizer = (folder / "tokenizer" / "tokenizer_config.json").is_file()
    chosen = load_tokenizer(folder if has_tokenizer else tokenizer or "builtin")
    return GivenWeights(network, text_model, own is not None, chosen)


def find_text_model(path_or_id: str | Path) -> str | Path | None:
    """Return where the text model of stage C weights is: in the file or folder, beside it, in the hub repository.

    Beside NAME.safetensors that is kohya's NAME_text_model.safetensors; beside our stage_c.safetensors,
    text_model.safetensors. In a folder of our exports without one it is in `diffusers/` or `combined.safetensors`:
    a text encoder that is not trained is only written there. None when there is none.
    """
    path = Path(path_or_id)
    if path.is_dir():
        inside = text_file_in_folder(path)
        if inside != path:
            return inside
        folders = (path, path / DIFFUSERS_FOLDER)
        found = next((folder for folder in folders if (folder / "text_encoder" / "config.json").is_file()), None)
        return found or next(filter(Path.is_file, [path / COMBINED_FILE]), None)
    if not path.is_file():
        return path_or_id
    with open_weights(path) as file:
        if any(key.endswith(TEXT_ANCHOR) for key in file.keys):
            return path
    own = TEXT_FILE if path.name == EXPORT_FILE else f"{path.stem}_text_model.safetensors"
    return path.with_name(own) if path.with_name(own).is_file() else None


def _load_text(found: str | Path, dtype: torch.dtype | None, text_encoder: str | None) -> "CLIPTextModelWithProjection":
    folder = Path(text_encoder or "")
    configs = [path / "config.json" for path in (folder, folder / "text_encoder") if text_encoder is not None]
    config_path = next((path for path in configs if path.is_file() and Path(found).is_file()), None)
    return load_text_model(found, dtype, config_path=config_path)
