"""Load and save stage C weights, in any of the three layouts, without changing a bit.

Files of one model (.safetensors, torch's own), diffusers folders and hub ids. Key names are in `layouts`, shapes in
`network_config`. Text model, encoder and previewer are loaded by their own modules.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from training.stage_c.layouts import ANCHOR, Layout, from_original, to_original
from training.stage_c.network import StageCConfig, StageCNetwork, config_from_state_dict
from training.stage_c.network_config import (
    config_from_diffusers,
    config_from_metadata,
    config_to_diffusers,
    config_to_metadata,
)
from training.weight_files import (
    WeightsReport,
    check_keys,
    load_into,
    locate_component,
    naming,
    read_tensors,
    write_tensors,
)

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"
EXPORT_FILE = "stage_c.safetensors"
STATE_FILE = "model.safetensors"
"""Stage C in a `-state` folder of kohya's trainer."""


def load_stage_c(
    path_or_id: str | Path, *, dtype: torch.dtype | None = torch.float32, config: StageCConfig | None = None
) -> StageCNetwork:
    """Load a stage C network, on the CPU and in training mode, from any of the layouts.

    path_or_id: a weights file (any layout, detected; also inside a combined checkpoint, behind a prefix), a folder of
    our exports or kohya's `-state`, a diffusers folder (of the component, or of a pipeline with `prior/`), or a hub id
    (`owner/name`, read from `prior/`; `owner/name/prior_lite` names another subfolder).
    The config comes from the argument, else from the file's metadata or config.json, else from the shapes with heads
    of 64. Tensors are converted one by one, with dtype None not at all: the peak is one copy in dtype, plus q, k and v
    of one block.

    Raises FileNotFoundError if nothing is there, WeightsError (a ValueError) listing what does not fit.
    """
    path = file_in_folder(Path(path_or_id))
    if path.is_file():
        state_dict, metadata = read_tensors(path, anchor=ANCHOR, dtype=dtype)
        config = config or config_from_metadata(metadata, source=path)
    else:
        source, subfolder = locate_component(path_or_id, "prior", file_name="config.json")
        path = _download(source, subfolder) if subfolder else Path(source)
        values = json.loads((path / "config.json").read_text("utf-8"))
        config = config or config_from_diffusers(values, source=path / "config.json")
        state_dict = {}
        for file in _weights_in_folder(path):
            state_dict.update(read_tensors(file, anchor=None, dtype=dtype)[0])
    return network_from_state_dict(state_dict, config=config, source=path)


def file_in_folder(path: Path) -> Path:
    """Return the weights file in one of our export folders or kohya's `-state` folders, else the path itself."""
    return next((path / name for name in (EXPORT_FILE, STATE_FILE) if (path / name).is_file()), path)


def network_from_state_dict(
    state_dict: Mapping[str, Tensor], *, config: StageCConfig | None = None, source: Path | str = "state dict"
) -> StageCNetwork:
    """Return a network that holds these tensors (any layout), without another copy of what needs no stacking.

    Raises WeightsError listing missing and unexpected keys and wrong shapes.
    """
    with naming(source):
        original = to_original(state_dict)
        config = config or config_from_state_dict(original)
    with torch.device("meta"):
        network = StageCNetwork(config)
    load_into(network, original, source=source)
    return network


def _download(repository: str, subfolder: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [f"{subfolder}/config.json", f"{subfolder}/{DIFFUSERS_WEIGHTS}*.safetensors*"]
    try:
        folder = Path(snapshot_download(repository, allow_patterns=patterns)) / subfolder
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"stage C {repository!r}: neither a local path nor a reachable hub id ({error}); download it first"
        ) from error
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"stage C {repository!r}: the repository has no {subfolder}/config.json")
    return folder


def _weights_in_folder(folder: Path) -> list[Path]:
    """Return the plain weights file, else the shards of its index, else the only variant there is."""
    single, index = (folder / f"{DIFFUSERS_WEIGHTS}.safetensors{suffix}" for suffix in ("", ".index.json"))
    if single.is_file():
        return [single]
    if index.is_file():
        names = json.loads(index.read_text("utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
    variants = sorted(folder.glob(f"{DIFFUSERS_WEIGHTS}.*.safetensors"))
    if len(variants) != 1:
        raise FileNotFoundError(
            f"{folder}: expected {single.name}, its index, or exactly one variant; found {[v.name for v in variants]}"
        )
    return variants


def save_stage_c(
    network: StageCNetwork,
    path: Path,
    *,
    layout: Layout = "original",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> WeightsReport:
    """Write stage C and return the report with the counts of values that overflowed or vanished in dtype.

    layout original or kohya: path is one .safetensors file. diffusers: path is a folder that gets config.json and
    diffusion_pytorch_model.safetensors. dtype None keeps each tensor's own. metadata: header entries such as
    modelspec(...); the config is added, so that any number of heads loads again. state_dict (original layout) replaces
    the network's own weights where those are sharded over ranks or an average is to be saved; call on one rank.

    Raises ValueError if the path does not suit the layout, WeightsError if state_dict has other keys than the network.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be one of {get_args(Layout)}, got {layout!r}")
    if (path.suffix == ".safetensors") == (layout == "diffusers"):
        wanted = "a folder" if layout == "diffusers" else "a .safetensors file"
        raise ValueError(f"{path}: layout {layout!r} is written as {wanted}")
    if state_dict is not None:
        with torch.device("meta"):  # where weights are sharded, the network's own may have no shapes
            check_keys(StageCNetwork(network.config).state_dict(), state_dict, source="state_dict to save")
    tensors = from_original(network.state_dict() if state_dict is None else state_dict, layout)
    header = {**(metadata or {}), **config_to_metadata(network.config)}
    if layout != "diffusers":
        return write_tensors(path, tensors, dtype=dtype, metadata=header)
    report = write_tensors(path / f"{DIFFUSERS_WEIGHTS}.safetensors", tensors, dtype=dtype, metadata=header)
    text = json.dumps(config_to_diffusers(network.config), indent=2, sort_keys=True) + "\n"
    (path / "config.json").write_text(text, encoding="utf-8")
    return report
