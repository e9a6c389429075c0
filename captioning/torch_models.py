"""What plug-ins that run on torch share: the device, transformers without its noise, the pixels' normalisation, weights
in plain files."""

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from captioning.devices import split_device, torch_name
from captioning.plugin import Device, MissingExtraError, ModelError, Pixels

Tensors = dict[str, npt.NDArray[np.float32]]
Shapes = dict[str, tuple[int, ...]]
_BUILDS = {
    "cuda": "torch's CUDA build: `pip install -e '.[caption,gpu]'`",
    "rocm": "torch's ROCm build",
    "migraphx": "torch's ROCm build",
    "openvino": "torch's XPU build",
    "xpu": "torch's XPU build",
}
TRANSFORMERS_FILES = ("config.json", "preprocessor_config.json", "model*.safetensors*", "pytorch_model*.bin*")


@dataclass(frozen=True)
class Processor:
    """The `preprocessor_config.json` of a transformers model; how it resizes is for each plug-in to read."""

    values: dict[str, Any]
    path: Path

    @classmethod
    def read(cls, folder: Path) -> "Processor":
        """Read it. Raises ModelError when it is missing, not JSON, or does not resize, scale and normalise."""
        path = folder / "preprocessor_config.json"
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ModelError(f"{path}: missing; mean, standard deviation and size must come from the model") from None
        except ValueError as error:
            raise ModelError(f"{path}: not valid JSON ({error})") from error
        if missing := [name for name in ("size", "image_mean", "image_std") if name not in values]:
            raise ModelError(f"{path}: {', '.join(missing)} missing")
        if off := [name for name in ("do_resize", "do_rescale", "do_normalize") if not values.get(name, True)]:
            raise ModelError(
                f"{path}: {', '.join(off)} is off, which no model of this kind has; its scores would be off"
            )
        return cls(values, path)

    def sides(self, name: str, *keys: str) -> list[int]:
        """Return `values[name]`, one number for all or a table with `keys`. Raises ModelError."""
        size = self.values.get(name, self.values["size"])
        if isinstance(size, int):
            return [size] * len(keys)
        if not isinstance(size, dict) or not set(keys) <= set(size):
            raise ModelError(f"{self.path}: {name} must give {' and '.join(keys)}, got {size!r}")
        return [int(size[key]) for key in keys]

    def normalise(self, batch: Pixels) -> npt.NDArray[np.float32]:
        """Return (N, 3, H, W) float32 = (x · rescale_factor − mean) / std; batch: (N, H, W, 3) uint8 RGB.

        Looked up in a table of the 256 levels: same bits, and a tenth of the time that the device would wait.
        """
        mean, std = (np.array(self.values[name], dtype=np.float32) for name in ("image_mean", "image_std"))
        levels = np.arange(256, dtype=np.uint8)[:, None]
        table = ((levels * np.float64(self.values.get("rescale_factor", 1 / 255))).astype(np.float32) - mean) / std
        normalised = np.empty((len(batch), 3, *batch.shape[1:3]), dtype=np.float32)
        for channel in range(3):
            np.take(table[:, channel], batch[..., channel], out=normalised[:, channel], mode="clip")
        return normalised


def torch_device(device: Device) -> str:
    """Return torch's name for the device. Raises ModelError when torch cannot use it; never falls back to the CPU."""
    torch = import_torch()
    name = torch_name(device)
    if name == "cpu":
        return name
    library = torch.xpu if name.startswith("xpu") else torch.cuda
    number = split_device(device)[1] or 0
    if not library.is_available() or number >= library.device_count():
        kind = split_device(device)[0]
        raise ModelError(
            f"annotate.device {device!r}: torch {torch.__version__} sees no such device: check the driver, and install "
            f"{_BUILDS[kind]} (which one is there: `python -c 'import torch; print(torch.__version__)'`)"
        )
    return name


def to_device(array: npt.NDArray[Any], device: str) -> Any:
    """Return the array as a tensor on torch's `device`; through pinned memory, without waiting, on a CUDA device."""
    tensor = import_torch().from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.startswith("cuda") else tensor.to(device)


def import_torch() -> Any:
    """Return the torch module. Raises MissingExtraError."""
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError("torch", extras="caption,cpu") from error
    return torch


def read_tensors(path: Path, *shapes: Shapes) -> Tensors:
    """Return the named tensors of a .safetensors or .pth file as float32; no code of a .pth is run.

    shapes: what the file may hold, one of them exactly. Counters of batch normalisation are left out.
    Raises ModelError.
    """
    torch = import_torch()
    try:
        if path.suffix == ".safetensors":
            from safetensors import SafetensorError
            from safetensors.torch import load_file

            try:
                state = load_file(path)
            except SafetensorError as error:
                raise ModelError(f"{path}: not readable as safetensors ({error})") from error
        else:
            # Published heads were saved on a GPU.
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ModelError(f"{path}: not readable as plain weights ({str(error)[:200]})") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ModelError(f"{path}: holds no table of named tensors; save the model's state_dict")
    state = {name: value for name, value in state.items() if not name.endswith(".num_batches_tracked")}
    found = {name: tuple(value.shape) for name, value in state.items()}
    if found not in shapes:
        expected = " or ".join(map(str, shapes))
        raise ModelError(f"{path}: expected the tensors {expected}, found {found}")
    return {name: value.detach().float().numpy() for name, value in state.items()}


@contextmanager
def quiet_transformers() -> Iterator[Any]:
    """Yield the transformers module with its progress bars and its reports of unused weights switched off."""
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", extras="caption,cpu") from error
    settings = transformers.logging
    verbosity, has_bars = settings.get_verbosity(), settings.is_progress_bar_enabled()
    settings.set_verbosity_error()
    settings.disable_progress_bar()
    try:
        yield transformers
    finally:
        settings.set_verbosity(verbosity)
        if has_bars:
            settings.enable_progress_bar()
