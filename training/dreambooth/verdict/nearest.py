"""The training picture that a preview is most like, per concept. For rank 0; without a network, see `likeness`."""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from PIL import Image

from sharding.images import ImageError, decode_rgb
from training.chunk_data import ChunkSource
from training.dreambooth.verdict.likeness import KEPT_SIDE, Floats, likenesses, structure, windows
from training.dreambooth.verdict.report import Nearest
from training.dreambooth.verdict.selection import CLASS_SUFFIX, LABEL, group_of
from training.loading.chunk_source import SampleBytes
from training.randomness import SampleIdentity

_COLUMNS = ["key", "shard", "image_offset", "image_bytes", "sha256"]


class References:
    """The training pictures of each concept, small. Read once, when they are first asked for.

    most: of a concept, counted from seed and key. Pictures that cannot be decoded are left out.
    """

    def __init__(self, source: ChunkSource, *, most: int, seed: int) -> None:
        self._source, self._most, self._seed = source, most, seed
        self._pictures: Mapping[str, Sequence[tuple[str, Image.Image]]] | None = None
        self._windows: dict[tuple[str, float], Floats] = {}

    def pictures(self) -> Mapping[str, Sequence[tuple[str, Image.Image]]]:
        """Return (key, small picture) of each concept. Raises ChunkError when a shard is missing or damaged."""
        if self._pictures is None:
            self._pictures = {name: self._read(rows) for name, rows in self._chosen(self._source.read_index()).items()}
        return self._pictures

    def nearest(self, preview: Image.Image) -> dict[str, Nearest]:
        """Return of each concept the picture that a preview is most like."""
        ratio, shown = round(preview.width / preview.height, 3), structure(preview)
        found: dict[str, Nearest] = {}
        for name, pictures in self.pictures().items():
            if pictures:
                values = likenesses(shown, self._windows_of(name, ratio))
                place = int(values.argmax())
                found[name] = Nearest(pictures[place][0], round(float(values[place]), 4))
        return found

    def _windows_of(self, name: str, ratio: float) -> Floats:
        if (name, ratio) not in self._windows:
            pictures = self.pictures()[name]
            self._windows[name, ratio] = np.stack([windows(picture, ratio=ratio) for _, picture in pictures])
        return self._windows[name, ratio]

    def _chosen(self, index: pa.Table) -> dict[str, list[dict[str, object]]]:
        groups = group_of(index)
        rows: dict[str, list[dict[str, object]]] = {}
        for group, row in zip(groups, index.select(_COLUMNS).to_pylist(), strict=True):
            if not group.endswith(CLASS_SUFFIX):
                rows.setdefault(group, []).append(row)

        def order(row: dict[str, object]) -> bytes:
            return SampleIdentity(self._seed, 0, LABEL, str(row["key"])).digest("reference")

        return {name: sorted(found, key=order)[: self._most] for name, found in sorted(rows.items())}

    def _read(self, rows: Sequence[Mapping[str, object]]) -> list[tuple[str, Image.Image]]:
        data, found = SampleBytes(self._source, with_checksum=False), list[tuple[str, Image.Image]]()
        try:
            for row in rows:
                try:
                    picture = decode_rgb(data.image(row), min_side=KEPT_SIDE)
                except ImageError:
                    continue  # training has told that it is broken
                picture.thumbnail((KEPT_SIDE, KEPT_SIDE), Image.Resampling.BOX)
                found.append((str(row["key"]), picture.convert("L")))
        finally:
            data.close()
        return found
