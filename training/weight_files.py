"""Read and write weights files: safetensors with reproducible bytes, and the prefixes found in the wild.

Knows no model: callers name a key to look for (the anchor) and compare keys themselves with `load_into`. The bytes
are written by `training.tensor_file`; here tensors are converted one at a time on the way, and losses counted.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from sharding.files import replacing
from training.tensor_file import TensorFile, bytes_of, header_of, shapes_of, write_file

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
NUM_KEYS_SHOWN = 8


class WeightsError(ValueError):
    """A weights file does not hold what was asked of it."""


@dataclass(frozen=True)
class WeightsReport:
    """What was written: num_overflowed finite values became infinite, num_vanished non-zero values became zero."""

    path: Path
    num_tensors: int
    num_values: int
    num_bytes: int
    num_overflowed: int
    num_vanished: int
    overflowed_keys: tuple[str, ...]


def locate_component(path_or_id: str | Path, component: str, *, file_name: str) -> tuple[str, str]:
    """Return (folder or hub id, subfolder) where a component of a diffusers pipeline is to be read.

    A folder either holds file_name itself or has a subfolder called component that does. Anything that is no folder
    and reads owner/name is taken for a hub id, with component as subfolder; owner/name/sub names another one.

    Raises FileNotFoundError if it is neither.
    """
    path = Path(path_or_id)
    if path.is_dir():
        for folder in (path, path / component):
            if (folder / file_name).is_file():
                return str(folder), ""
        raise FileNotFoundError(f"{path}: no {file_name} here or in {component}/; give that folder or a whole pipeline")
    parts = path.parts
    if path.exists() or path.is_absolute() or path.suffix == ".safetensors" or len(parts) not in (2, 3):
        raise FileNotFoundError(f"{path}: no such {component}; give a folder, a weights file or a hub id owner/name")
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else component


@dataclass(frozen=True)
class OpenWeights:
    """A weights file whose tensors are read one by one, each into memory of its own. keys: as in the file."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    """By key; of a safetensors file no tensor is read for them."""
    metadata: Mapping[str, str]
    tensor: Callable[[str], Tensor]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self.shapes)

    def prefix(self, anchor: str) -> str:
        """Return what stands before `anchor`, a key that every file of one model has: "" where it also stands alone.

        Raises WeightsError if the anchor is not there or stands behind several prefixes.
        """
        prefixes = {key.removesuffix(anchor) for key in self.keys if key == anchor or key.endswith("." + anchor)}
        if "" in prefixes or len(prefixes) == 1:
            return min(prefixes)
        if not prefixes:
            shown = ", ".join(sorted(self.keys)[:NUM_KEYS_SHOWN])
            raise WeightsError(
                f"{self.path}: no key {anchor!r}, so this is a file of another model; it starts with {shown}"
            )
        raise WeightsError(
            f"{self.path}: key {anchor!r} stands behind several prefixes: {sorted(prefixes)}; split the file"
        )


@contextmanager
def open_weights(path: Path) -> Iterator[OpenWeights]:
    """Open a weights file. `.pt`, `.pth`, `.ckpt` and `.bin` are read whole, weights only, also under `state_dict`.

    Raises FileNotFoundError, or WeightsError if the file is of another kind.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights file")
    if path.suffix in TORCH_SUFFIXES:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            raise WeightsError(
                f"{path}: holds more than tensors, or is damaged ({str(error).splitlines()[0]}); only tensors are "
                "read, because the rest of a pickle is a program: get the model as .safetensors"
            ) from error
        loaded = loaded.get("state_dict", loaded)
        tensors = {key: value for key, value in loaded.items() if isinstance(value, Tensor)}
        yield OpenWeights(path, shapes_of(tensors), {}, lambda key: tensors[key].clone())
        return
    if path.suffix != ".safetensors":
        raise WeightsError(f"{path}: expected .safetensors or one of {', '.join(TORCH_SUFFIXES)}")

    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
        # Not by the library's map of the file: until it is closed, the whole file counts as memory of this process.
        tensors_there = TensorFile(path)
        yield OpenWeights(path, tensors_there.shapes, metadata, tensors_there.tensor)
    except SafetensorError as error:
        raise WeightsError(f"{path}: not a readable safetensors file ({error}); copy or download it again") from error


def read_tensors(
    path: Path, *, anchor: str | None, dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of one model in a file, without their common prefix, and the file's metadata.

    anchor: a key every file of this model has. Where it stands behind a prefix (`model.diffusion_model.`,
    `text_encoder.`, `state_dict.`), only keys with that prefix are taken; None takes all keys as they are.
    dtype converts floating point tensors one by one: the peak is one copy in dtype and the largest tensor as it is in
    the file. The file may be replaced afterwards.

    Raises FileNotFoundError, or WeightsError; see `open_weights` and `OpenWeights.prefix`.
    """
    with open_weights(path) as file:
        prefix = "" if anchor is None else file.prefix(anchor)
        tensors = {
            key.removeprefix(prefix): converted(file.tensor(key), dtype) for key in file.keys if key.startswith(prefix)
        }
        return tensors, dict(file.metadata)


def converted(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return the tensor in dtype, if that is given and it holds floating point numbers."""
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


@contextmanager
def naming(source: Path | str) -> Iterator[None]:
    """Turn a ValueError about what a file holds into a WeightsError that names the file."""
    try:
        yield
    except ValueError as error:
        raise WeightsError(f"{source}: {error}") from error


def check_keys(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], *, source: Path | str) -> None:
    """Raise WeightsError listing missing keys, unexpected keys and wrong shapes, if there are any."""
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    misshapen = [
        f"{key} {tuple(found[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in found and found[key].shape != value.shape
    ]
    problems = []
    for title, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", misshapen)):
        if names:
            more = f", and {len(names) - NUM_KEYS_SHOWN} more" if len(names) > NUM_KEYS_SHOWN else ""
            problems.append(f"{len(names)} {title}: {', '.join(names[:NUM_KEYS_SHOWN])}{more}")
    if problems:
        raise WeightsError(f"{source}: keys do not fit the model; {'; '.join(problems)}")


def load_into(module: nn.Module, state_dict: Mapping[str, Tensor], *, source: Path | str) -> None:
    """Give a module (also one on the meta device) these tensors as its weights, without copying.

    Raises WeightsError if keys or shapes differ.
    """
    check_keys(module.state_dict(), state_dict, source=source)
    module.load_state_dict(dict(state_dict), assign=True)


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    keep_dtype: str = "",
    metadata: Mapping[str, str] | None = None,
) -> WeightsReport:
    """Write a safetensors file in one go and return what the conversion to dtype did to the values.

    Tensors are converted and written one at a time; those whose name begins with keep_dtype stay as they are. Same
    tensors and metadata, same bytes. The metadata always contains format = pt, which transformers asks for. What was
    written is read again and compared; the file appears whole and right, or not at all.

    Raises ValueError for a dtype that safetensors files do not hold or a metadata value that is not a string,
    DiskFullError, WeightsError if the disk gives back something else.
    """
    for key, text in (metadata or {}).items():
        if not isinstance(text, str):
            raise ValueError(f"{path}: metadata {key!r} must be a string, got {text!r}")

    def is_kept(key: str) -> bool:
        return bool(keep_dtype) and key.startswith(keep_dtype)

    targets = {
        key: dtype if dtype is not None and tensor.is_floating_point() and not is_kept(key) else tensor.dtype
        for key, tensor in tensors.items()
    }
    layout = {key: (targets[key], tensor.shape) for key, tensor in tensors.items()}
    names, header = header_of(path, layout, {**(metadata or {}), "format": "pt"})
    overflowed: dict[str, int] = {}
    vanished: dict[str, int] = {}

    def parts() -> Iterator[memoryview]:
        yield header
        for name in names:
            source = tensors[name].detach()
            converted = source.to(targets[name])
            if converted.dtype != source.dtype:
                overflowed[name] = int((source.isfinite() & ~converted.isfinite()).sum())
                vanished[name] = int(((source != 0) & (converted == 0)).sum())
            yield bytes_of(converted.cpu().contiguous())

    with replacing(path) as temporary:
        written = write_file(temporary, parts())
        _compare(temporary, {name: (tensors[name].detach(), targets[name]) for name in names}, shown_as=path)
    return WeightsReport(
        path=path,
        num_tensors=len(names),
        num_values=sum(tensor.numel() for tensor in tensors.values()),
        num_bytes=written.num_bytes,
        num_overflowed=sum(overflowed.values()),
        num_vanished=sum(vanished.values()),
        overflowed_keys=tuple(name for name, count in overflowed.items() if count),
    )


def _compare(written: Path, tensors: Mapping[str, tuple[Tensor, torch.dtype]], *, shown_as: Path) -> None:
    """Raise WeightsError unless a file holds these tensors, in these formats, bit for bit. Read by another reader."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(written, framework="pt") as file:
            wrong = sorted(set(file.keys()) ^ tensors.keys())
            for name, (source, dtype) in tensors.items() if not wrong else ():
                if bytes_of(file.get_tensor(name)) != bytes_of(source.to(dtype).cpu().contiguous()):
                    wrong.append(name)
    except SafetensorError as error:
        raise WeightsError(
            f"{shown_as}: what was written cannot be read again ({error}); is the disk healthy?"
        ) from error
    if wrong:
        raise WeightsError(
            f"{shown_as}: {len(wrong)} tensors read back differ from what was written, first {wrong[0]}; "
            "is the disk healthy?"
        )
