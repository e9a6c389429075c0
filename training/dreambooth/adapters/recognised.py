"""Whether weights that somebody names are a whole model of Stable Diffusion, or another recipe's."""

import json
from collections.abc import Iterable
from pathlib import Path

from training.dreambooth.single_file.layout import TEXT_PREFIXES
from training.weight_files import open_weights

_INDEX = "model_index.json"


def is_stable_diffusion(path_or_id: str) -> bool:
    """Tell whether a single file, a diffusers folder or a hub id is of Stable Diffusion 1, 2 or XL.

    Raises WeightsError for a file that is not readable.
    """
    path = Path(path_or_id)
    if path.is_file():
        with open_weights(path) as file:
            keys = file.keys
        return any(all(_has(keys, prefix) for prefix, _ in prefixes) for prefixes in TEXT_PREFIXES.values())
    index = path / _INDEX if path.is_dir() else _index_on_hub(path_or_id)
    if index is None or not index.is_file():
        return False
    name = str(json.loads(index.read_text("utf-8")).get("_class_name", ""))
    return name.startswith("StableDiffusion")


def _has(keys: Iterable[str], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in keys)


def _index_on_hub(repository: str) -> Path | None:
    """Return the index of a pipeline on the hub; None where there is none, which the recipe's loader then says."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(repository, _INDEX))
    except (HfHubHTTPError, HFValidationError, OSError):
        return None
