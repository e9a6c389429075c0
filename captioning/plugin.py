"""What a tagger or scorer is to the annotate loop, and where its files are.

A plug-in is a module with two functions, `identify` and `load`, registered in `registry.PLUGINS`. Importing it must
stay cheap: torch, transformers and onnxruntime are imported when a model is loaded, never by a decode worker.
Nothing here knows a particular model.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from sharding.files import digest_of, sha256_file

Device = Literal["cpu", "cuda", "rocm", "migraphx", "openvino"]
Pixels = npt.NDArray[np.uint8]
Row = dict[str, Any]
"""One row of an annotation part without its key; `status` is "ok" or why there is no result."""

OK = "ok"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class ModelError(ValueError):
    """A model cannot be found, loaded or run on the asked device."""


class MissingExtraError(ModelError):
    """A library that a plug-in needs is not installed; the message says which extra brings it."""

    def __init__(self, library: str, *, extras: str) -> None:
        super().__init__(f"{library} is not installed: run `pip install -e '.[{extras}]'`")


@dataclass(frozen=True)
class Identity:
    """Which model with which settings a row comes from. Rows of equal `digest` are interchangeable."""

    model: str
    """Path or hub id, as configured."""
    revision: str
    """Hub commit, or SHA-256 over the files of a local model."""
    preprocessing: str
    """Name and version of what happens between decoded image and model."""
    schema: pa.Schema
    licence: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else changes rows: the floor of a tagger, the precision."""
    record_columns: tuple[str, ...] = ()
    """Columns of the record that rows are made from; none means: from the image."""
    labels: pa.Table | None = None
    """schema.LABELS, for taggers."""

    @property
    def needs_image(self) -> bool:
        return not self.record_columns

    @property
    def digest(self) -> str:
        """Independent of where the model lies and of device and batch size."""
        return digest_of([self.revision, self.preprocessing, dict(self.settings), str(self.schema)])

    @property
    def metadata(self) -> dict[str, str]:
        """What is stored with every part."""
        return {
            "model": self.model,
            "revision": self.revision,
            "preprocessing": self.preprocessing,
            "licence": self.licence,
            "model_digest": self.digest,
        }


class Preparer(Protocol):
    """Decoded image → the pixels a model sees. Runs in decode workers: picklable, and deterministic."""

    @property
    def min_side(self) -> int:
        """Pixels that the shorter side of a picture must have, so that it is not enlarged."""
        ...

    def prepare(self, image: Image.Image) -> Pixels:
        """Return (H, W, 3) uint8, the same H and W for every image; `image` is upright RGB and is not changed."""
        ...


@runtime_checkable
class ImageModel(Protocol):
    """A loaded model that looks at pixels."""

    @property
    def preparer(self) -> Preparer: ...

    @property
    def batch_size(self) -> int | None:
        """Batch size the file is fixed to, or None when any will do."""
        ...

    def predict(self, batch: Pixels) -> list[Row]:
        """Return one row per image; batch: (N, H, W, 3) uint8. A row must not depend on its neighbours."""
        ...


@runtime_checkable
class RecordModel(Protocol):
    """A model that needs no pixels, only columns of the record."""

    def annotate_records(self, records: pa.Table) -> list[Row]:
        """Return one row per record; records: the identity's `record_columns`."""
        ...


class Plugin(Protocol):
    """The module of a tagger or scorer. `settings` is its own table of the config, without the shared keys' defaults
    being repeated anywhere."""

    def identify(self, settings: Any) -> Identity:
        """Find the model's files (downloading them if need be) and say what rows will be made from. Loads nothing."""
        ...

    def load(self, settings: Any, *, device: Device) -> ImageModel | RecordModel:
        """Load the model onto the device. Raises ModelError."""
        ...


# --- files ---


def locate(model: str, *, revision: str, patterns: Sequence[str]) -> tuple[Path, str]:
    """Return (folder, exact revision) of a local model folder, or of a hub model, downloading what `patterns` name.

    The revision of a local folder is a SHA-256 over the files that match, and `revision` is not read.
    Raises ModelError naming `model` when neither can be had.
    """
    folder = Path(model)
    if folder.is_dir():
        files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
        if not files:
            raise ModelError(f"{folder}: holds none of {', '.join(patterns)}; is it the folder of this kind of model?")
        return folder, hash_files(files)
    if not _HUB_ID.fullmatch(model):
        raise ModelError(f"{model}: no such model folder, and not a hub id OWNER/NAME")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", extras="caption,cpu") from error
    try:
        snapshot = Path(snapshot_download(model, revision=revision, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{model}@{revision}: no such folder here, and it cannot be had from the hub ({_first_line(error)}); "
            "download it once on a machine with access, or give the path of a local copy"
        ) from error
    return snapshot, snapshot.name


def locate_file(path: str, *, revision: str) -> tuple[Path, str]:
    """Return (file, exact revision) of a local file, or of OWNER/NAME/PATH on the hub. Raises ModelError."""
    local = Path(path)
    if local.is_file():
        return local, hash_files([local])
    parts = path.split("/")
    if len(parts) < 3 or not _HUB_ID.fullmatch("/".join(parts[:2])):
        raise ModelError(f"{path}: no such file, and not OWNER/NAME/FILE on the hub")
    inner = "/".join(parts[2:])
    folder, commit = locate("/".join(parts[:2]), revision=revision, patterns=[inner])
    if not (folder / inner).is_file():
        raise ModelError(f"{path}@{revision}: the repository has no file {inner}")
    return folder / inner, commit


def hash_files(files: Iterable[Path]) -> str:
    """Return `sha256:` and a digest over names and contents, independent of the folder they are in."""
    return "sha256:" + digest_of([[file.name, sha256_file(file)] for file in files])


def torch_device(device: Device) -> str:
    """Return torch's name for the device. Raises ModelError when torch cannot use it; never falls back to the CPU."""
    torch = import_torch()
    if device == "cpu":
        return "cpu"
    if device == "openvino":
        if hasattr(torch, "xpu") and torch.xpu.is_available():
            return "xpu"
        raise ModelError("annotate.device 'openvino': torch sees no Intel device (xpu); install torch's xpu build")
    if not torch.cuda.is_available():
        raise ModelError(f"annotate.device {device!r}: torch {torch.__version__} sees no such device; use device 'cpu'")
    return "cuda"


def import_torch() -> Any:
    """Return the torch module. Raises MissingExtraError."""
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError("torch", extras="caption,cpu") from error
    return torch


def import_transformers() -> Any:
    """Return the transformers module. Raises MissingExtraError."""
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", extras="caption,cpu") from error
    return transformers


@contextmanager
def quiet_transformers() -> Iterator[Any]:
    """Yield the transformers module with its progress bars and its reports of unused weights switched off."""
    transformers = import_transformers()
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


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
