"""Read from the manifest what dedupe decides about: numbers for every kept file, and where its row stands.

Whatever is text (paths, tags, dates of importers) is read again, for the few rows that need it, through `Places`.
Decides nothing.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sharding.config import DatasetConfig
from sharding.decisions import Decisions
from sharding.duplicates.cut import Candidates
from sharding.images import LOSSLESS_FORMATS
from sharding.keys import is_in, key_numbers, key_texts
from sharding.pictures.phash import are_degenerate, hash_bits, hash_words
from sharding.tables import read_part

_COLUMNS = (
    "key", "sha256", "source", "num_bytes", "format", "width", "height", "created_at", "phash", "turned_phashes",
    "status",
)  # fmt: skip
_NO_DATE = np.iinfo(np.int64).max
_WORD_BYTES = 8


class DuplicateKeyError(ValueError):
    """Two different SHA-256 begin with the same 16 hex digits, so they would be one sample."""


@dataclass(frozen=True)
class Places:
    """Where the candidates stand in the manifest. part: (N,) number in parts, ascending; row: (N,) row in its part."""

    parts: tuple[Path, ...]
    part: npt.NDArray[np.int32]
    row: npt.NDArray[np.int32]

    def of_part(self, number: int) -> slice:
        """Return the candidates that stand in a part."""
        first, last = np.searchsorted(self.part, [number, number + 1])
        return slice(int(first), int(last))

    def read(self, rows: npt.NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
        """Return columns of the manifest for some candidates, in the order of `rows`. Reads only their parts."""
        distinct, inverse = np.unique(rows, return_inverse=True)
        bounds = np.searchsorted(self.part[distinct], np.arange(len(self.parts) + 1))
        tables = []
        for number, part in enumerate(self.parts):
            if wanted := self.row[distinct[bounds[number] : bounds[number + 1]]].tolist():
                tables.append(read_part(part, columns).take(pa.array(wanted)).combine_chunks())
        table = pa.concat_tables(tables) if tables else read_part(self.parts[0], columns).slice(0, 0)
        return table if np.array_equal(distinct, rows) else table.take(pa.array(inverse))


def read_candidates(
    config: DatasetConfig, parts: Sequence[Path], planned: npt.NDArray[np.uint64], decisions: Decisions
) -> tuple[Candidates, Places]:
    """Return what there is to decide about: all rows of the parts with status `kept`.

    planned: keys of the plan, sorted. Raises ValueError when a part has other hashes than the config says,
    DuplicateKeyError.
    """
    pieces, numbers, rows = [], [], []
    for number, part in enumerate(parts):
        table = read_part(part, _COLUMNS)
        is_kept = pc.equal(table.column("status"), "kept").to_numpy()
        pieces.append(_piece(config, part, table.filter(pa.array(is_kept))))
        numbers.append(np.full(len(pieces[-1]["key"]), number, dtype=np.int32))
        rows.append(np.flatnonzero(is_kept).astype(np.int32))
    columns = {}
    for name in list(pieces[0]):
        columns[name] = np.concatenate([piece.pop(name) for piece in pieces])
    places = Places(tuple(parts), np.concatenate(numbers), np.concatenate(rows))
    _refuse_unequal(columns["key"], columns.pop("rest_of_sha256"), places)
    pa.default_memory_pool().release_unused()
    keys = columns["key"]
    return (
        Candidates(
            **columns,
            is_planned=is_in(keys, planned),
            is_dropped=is_in(keys, decisions.keys("drop")),
            is_preferred=is_in(keys, decisions.keys("preferred_keeper")),
            is_protected=is_in(keys, decisions.keys("keep")),
            is_apart=is_in(keys, decisions.keys("not_a_duplicate")),
        ),
        places,
    )


def content_digests(candidates: Candidates, places: Places) -> list[str]:
    """Return for each part a digest of what pairs are made from: its kept keys and hashes, in order.

    Sketches and local features follow from the key and their version, which is among the settings.
    """
    digests = []
    for number in range(len(places.parts)):
        rows = places.of_part(number)
        digest = hashlib.sha256()
        for values in (candidates.key, candidates.phash, candidates.turned):
            digest.update(np.ascontiguousarray(values[rows]).data)
        digests.append(digest.hexdigest())
    return digests


def _piece(config: DatasetConfig, part: Path, table: pa.Table) -> dict[str, Any]:
    """Return the columns of Candidates that stand in the manifest, and `rest_of_sha256`."""
    settings = config.dedupe
    num_words = hash_words(settings.algorithm, settings.hash_size)
    sources = table.column("source").combine_chunks().dictionary_encode()
    names = sources.dictionary.to_pylist()
    code = sources.indices.to_numpy(zero_copy_only=False)
    priorities = np.array([config.sources[name].priority if name in config.sources else 0 for name in names], np.int32)
    references = np.array([name in config.sources and config.sources[name].is_reference for name in names], bool)
    phash = _words(table, "phash", num_words, part)
    return {
        "key": key_numbers(table.column("key")),
        "rest_of_sha256": key_numbers(pc.utf8_slice_codeunits(table.column("sha256"), 16, 32)),
        "phash": phash,
        "turned": _words(table, "turned_phashes", len(settings.turns) * num_words, part).reshape(
            len(table), len(settings.turns), num_words
        ),
        "is_comparable": ~are_degenerate(phash, num_bits=hash_bits(settings.algorithm, settings.hash_size)),
        "priority": priorities[code],
        "pixels": table.column("width").to_numpy().astype(np.int64) * table.column("height").to_numpy(),
        "lossless": pc.is_in(table.column("format"), value_set=pa.array(LOSSLESS_FORMATS)).to_numpy(),
        "bytes": table.column("num_bytes").to_numpy(),
        "date": pc.fill_null(table.column("created_at").cast(pa.int64()), int(_NO_DATE)).to_numpy(),
        "is_reference": references[code],
    }


def _words(table: pa.Table, name: str, num_words: int, part: Path) -> npt.NDArray[np.uint64]:
    """Return (N, num_words) from a column of big-endian hashes."""
    if not len(table) or (not num_words and name != "phash"):
        return np.empty((len(table), num_words), dtype=np.uint64)
    num_bytes = _WORD_BYTES * num_words
    lengths = pc.unique(pc.binary_length(table.column(name))).to_pylist()
    if wrong := [length for length in lengths if length != num_bytes]:
        raise ValueError(
            f"{part}: {name} of {_bits(wrong[0])}, [dedupe] algorithm, hash_size and turns mean {_bits(num_bytes)}; "
            "run `python -m sharding scan` again"
        )
    fixed = table.column(name).cast(pa.binary(num_bytes)).combine_chunks()
    start = fixed.offset * num_bytes
    octets = np.frombuffer(fixed.buffers()[1], np.uint8)[start : start + len(table) * num_bytes]
    return octets.view(">u8").astype(np.uint64).reshape(len(table), num_words)


def _bits(num_bytes: int | None) -> str:
    return f"{8 * (num_bytes or 0)} bits"


def _refuse_unequal(
    keys: npt.NDArray[np.uint64], rest: npt.NDArray[np.uint64], places: Places
) -> None:  # fmt: skip
    order = np.argsort(keys, kind="stable")
    clash = (keys[order[1:]] == keys[order[:-1]]) & (rest[order[1:]] != rest[order[:-1]])
    if not clash.any():
        return
    key = keys[order[int(np.argmax(clash))]]
    paths = places.read(np.flatnonzero(keys == key)[:4], ["source", "path"]).to_pylist()
    where = ", ".join(f"{row['source']}/{row['path']}" for row in paths)
    name = key_texts(np.array([key]))[0].as_py()
    raise DuplicateKeyError(f"key {name}: different files have it: {where}; remove or re-encode all but one")
