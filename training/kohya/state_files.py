"""Find and read what kohya's stage C trainer has saved: exported weights, and accelerate's `-state` folders.

Which file is which is told by its keys. Nothing is unpickled but plain tensors and numbers.
"""

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.stage_c.layouts import ANCHOR as NETWORK_ANCHOR
from training.stage_c.layouts import to_original
from training.stage_c.text_files import ANCHOR as TEXT_ANCHOR
from training.stage_c.text_files import read_text_tensors
from training.weight_files import WeightsError, open_weights, read_tensors

_TEXT_SUFFIX = "_text_model"
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class KohyaFiles:
    """Where each thing lies; None: it is not there."""

    network: Path | None
    text: Path | None
    optimizer: Path | None = None
    scheduler: Path | None = None
    scaler: Path | None = None
    left: tuple[str, ...] = field(default=())
    """Names of files that are not read."""


def find_files(source: Path) -> KohyaFiles:
    """Return what a `-state` folder holds, or an export with its text model beside it.

    Raises FileNotFoundError, WeightsError for a folder that is no `-state` or a file of another model.
    """
    if source.is_file():
        beside = source.with_name(f"{source.stem}{_TEXT_SUFFIX}{source.suffix}")
        paths = [source, *([beside] if beside.is_file() else [])]
    elif source.is_dir():
        paths = sorted(path for pattern in _WEIGHTS for path in source.glob(pattern))
    else:
        raise FileNotFoundError(f"{source}: no such file or folder; give kohya's NAME-state folder or NAME.safetensors")
    found = {_kind(path): path for path in reversed(paths)}
    network, text = found.get("network"), found.get("text")
    if network is None and text is None:
        exports = [path.name for path in sorted(source.glob("*.safetensors"))] if source.is_dir() else []
        hint = f"; did you mean one of {', '.join(exports[:4])}?" if exports else ""
        raise WeightsError(f"{source}: holds no stage C and no text model{hint}")
    if source.is_file():
        return KohyaFiles(network, text)
    own = {name: source / name for name in ("optimizer.bin", "scheduler.bin", "scaler.pt")}
    there = {name: path if path.is_file() else None for name, path in own.items()}
    read = {path.name for path in (network, text, *there.values()) if path is not None}
    left = tuple(sorted(path.name for path in source.iterdir() if path.name not in read))
    return KohyaFiles(network, text, there["optimizer.bin"], there["scheduler.bin"], there["scaler.pt"], left)


def _kind(path: Path) -> str:
    with open_weights(path) as file:
        keys = list(file.keys)
    for kind, anchor in (("network", NETWORK_ANCHOR), ("text", TEXT_ANCHOR)):
        if any(key == anchor or key.endswith(f".{anchor}") for key in keys):
            return kind
    return "another"


def read_network(path: Path) -> dict[str, Tensor]:
    """Return stage C in our network's names: q, k and v stacked."""
    return to_original(read_tensors(path, anchor=NETWORK_ANCHOR)[0])


def read_text_model(path: Path) -> dict[str, Tensor]:
    """Return the text model in transformers' names."""
    return read_text_tensors(path)[0]


def read_pickled(path: Path) -> Any:
    """Return what a torch file holds, tensors on the CPU; code in it is not run.

    Raises WeightsError when it holds anything but tensors, numbers, texts and containers, or is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        first = str(error).splitlines()[0]
        raise WeightsError(f"{path}: not read: damaged, or holds more than tensors and numbers ({first})") from error
