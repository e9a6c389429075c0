"""What a tagger or scorer is to the annotate loop.

A plug-in is a module with a class `Settings` and two functions, `identify` and `load`, registered in
`registry.PLUGINS`. Importing it must stay cheap: torch, transformers and onnxruntime are imported when a model is
loaded, never by a decode worker. Nothing here knows a particular model.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from captioning.prompts import Prompt
from sharding.config import Config
from sharding.files import digest_of

Device = str
"""A name of `devices`: cpu, cuda, cuda:1, …"""
Pixels = npt.NDArray[np.uint8]
Features = npt.NDArray[np.float32]
"""What a backbone says about a batch: (N, num_features)."""
Row = dict[str, Any]
"""One row of an annotation part without its key; `status` is "ok" or why there is no result."""

OK = "ok"
NOT_FINITE = "not_finite"
"""Status of a result with NaN or infinity: they compare false with every threshold and would pass for a low score."""
NOT_APPLICABLE = "not_applicable"
"""Status of a picture that a model has nothing to say about, such as a PNG's JPEG quality; it is not broken."""
FULL_SIZE = 2**31 - 1
"""`min_side` of a preparer that must see every pixel of the file."""


def empty_row(schema: pa.Schema, status: str) -> Row:
    """Return a row that says why there is no result: empty lists and nulls in the columns of `schema`."""
    values: Row = {
        column.name: [] if pa.types.is_list(column.type) else None for column in schema if column.name != "key"
    }
    return values | {"status": status}


class ModelError(ValueError):
    """A model cannot be found, loaded or run on the asked device."""


class MissingExtraError(ModelError):
    """A library that a plug-in needs is not installed; the message says which extra brings it."""

    def __init__(self, library: str, *, extras: str) -> None:
        super().__init__(f"{library} is not installed: run `pip install -e '.[{extras}]'`")


class ModelSettings(Config):
    """Base of the settings of every kind of model."""

    kind: str
    """Selects the plug-in."""


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
    prompt: Prompt | None = None
    """For captioners: what the model is asked. Its text is stored in the column `prompt`."""

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


class Preparer(Hashable, Protocol):
    """Decoded image → what a model sees. Runs in decode workers: picklable, and deterministic.

    Models with equal preparers share what comes out, so a preparer is a frozen dataclass.
    """

    @property
    def min_side(self) -> int:
        """Pixels that the shorter side of a picture must have, so that it is not enlarged; or FULL_SIZE."""
        ...

    def prepare(self, image: Image.Image) -> npt.NDArray[Any]:
        """Return (H, W, 3) uint8, or numbers; `image` is upright RGB, not to change.

        In one shape for every image, but for captioners.
        """
        ...


@runtime_checkable
class FilePreparer(Protocol):
    """A preparer that wants the file's bytes, too: tables and headers that pixels do not show. Called instead."""

    def prepare_file(self, data: bytes, image: Image.Image) -> npt.NDArray[Any]:
        """As `Preparer.prepare`; data: the whole file."""
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

    def predict(self, batch: npt.NDArray[Any]) -> list[Row]:
        """Return one row per image; batch: (N, …) of what was prepared. A row must not depend on its neighbours."""
        ...


@runtime_checkable
class Captioner(Protocol):
    """A loaded model that says something about a picture when it is asked."""

    @property
    def preparer(self) -> Preparer: ...

    @property
    def batch_size(self) -> int | None:
        """As in ImageModel."""
        ...

    def describe(self, pictures: Sequence[Pixels], prompts: Sequence[str], keys: Sequence[str]) -> list[Row]:
        """Return one schema.TEXTS row per picture; chance, if any, comes from its key."""
        ...


class Backbone(Protocol):
    """A loaded network that several heads share: it sees each image once for all of them."""

    @property
    def preparer(self) -> Preparer: ...

    @property
    def batch_size(self) -> int | None:
        """As in ImageModel."""
        ...

    def embed(self, batch: npt.NDArray[Any]) -> Features:
        """Return (N, num_features) float32; batch: (N, …) of what was prepared."""
        ...


class BackboneSpec(Hashable, Protocol):
    """Which network, in which revision, behind which pre-processing. Heads with equal specs share one."""

    def load(self, *, device: Device) -> Backbone:
        """Load it onto the device. Raises ModelError."""
        ...


@runtime_checkable
class HeadModel(Protocol):
    """A loaded model that looks at the features of a backbone instead of pixels."""

    @property
    def backbone(self) -> BackboneSpec: ...

    def score(self, features: Features) -> list[Row]:
        """Return one row per image; a row must not depend on its neighbours."""
        ...


@runtime_checkable
class RecordModel(Protocol):
    """A model that needs no pixels, only columns of the record."""

    def annotate_records(self, records: pa.Table) -> list[Row]:
        """Return one row per record; records: the identity's `record_columns`."""
        ...


class Plugin(Protocol):
    """The module of a tagger or scorer; `settings` is an instance of its own `Settings`."""

    @property
    def Settings(self) -> type[ModelSettings]:
        """Its table of the config."""
        ...

    def identify(self, settings: Any) -> Identity:
        """Find the model's files (downloading them if need be) and say what rows will be made from. Loads nothing."""
        ...

    def load(self, settings: Any, *, device: Device) -> "Model":
        """Load the model onto the device, a head without its backbone. Raises ModelError."""
        ...


Model = ImageModel | Captioner | HeadModel | RecordModel
"""What a plug-in loads."""
