"""Tags of the pictures of one part as flat arrays: gathering them, cutting them by probability, rules within a picture.

An entry is (row, tag number of the lexicon, probability). What tags mean is the lexicon's; words come later.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captioning.lexicon import NO_TAG, Lexicon, LexiconArrays
from captioning.tag_rules import TagsConfig
from captioning.tiers import passes
from captioning.words import Ids

Floats = npt.NDArray[np.float32]
_LOSSLESS_FORMATS = ("png", "jxl")


@dataclass(frozen=True)
class TagStream:
    """(N,) arrays: rows ascending, tag numbers, all >= 0."""

    rows: Ids
    tags: Ids

    def where(self, wanted: npt.NDArray[np.bool_]) -> "TagStream":
        return TagStream(self.rows[wanted], self.tags[wanted])


@dataclass(frozen=True)
class Labels:
    """A tagger's labels, as the lexicon knows them."""

    tags: Ids
    """(L,) tag numbers, NO_TAG where the policy drops the label."""
    is_character: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, table: pa.Table, lexicon: Lexicon) -> "Labels":
        categories = table.column("category").to_pylist()
        tags = np.full(len(categories), NO_TAG, dtype=np.int64)
        for category in dict.fromkeys(categories):
            places = [place for place, it in enumerate(categories) if it == category]
            names = table.column("name").take(pa.array(places, pa.int64())).to_pylist()
            tags[places] = lexicon.numbers(names, category)
        return cls(tags, np.array([it == "character" for it in categories], dtype=bool))


def record_tags(records: pa.Table, rules: TagsConfig, lexicon: Lexicon) -> list[TagStream]:
    """Return the records' own tags, a stream for each category, in their order."""
    streams = []
    for category in rules.record_categories:
        lists = records.column(f"tags_{category}").combine_chunks()
        encoded = pc.list_flatten(lists).dictionary_encode()
        numbers = np.array(lexicon.numbers(encoded.dictionary.to_pylist(), category), dtype=np.int64)
        rows = np.asarray(pc.list_parent_indices(lists), dtype=np.int64)
        tags = numbers[np.asarray(encoded.indices, dtype=np.int64)] if len(rows) else rows
        streams.append(TagStream(rows, tags).where(tags >= 0))
    if rules.compression_artifacts_bytes and "general" in rules.record_categories:
        is_small = pc.less(records.column("num_bytes"), rules.compression_artifacts_bytes)
        is_lossy = pc.invert(pc.is_in(records.column("format"), value_set=pa.array(_LOSSLESS_FORMATS)))
        rows = np.flatnonzero(np.asarray(pc.fill_null(pc.and_(is_small, is_lossy), False)))
        (tag,) = lexicon.numbers(["compression_artifacts"], "general")
        tags = np.full(len(rows), tag, dtype=np.int64)
        streams.append(TagStream(rows, tags).where(tags >= 0))
    return streams


def tagger_tags(annotation: pa.Table, labels: Labels, rules: TagsConfig, *, floor: float) -> TagStream:
    """Return the tags that pass, in the order that the policy asks for. floor: lower ones were not stored."""
    lists = annotation.column("tag_ids").combine_chunks()
    rows = np.asarray(pc.list_parent_indices(lists), dtype=np.int64)
    ids = np.asarray(pc.list_flatten(lists), dtype=np.int64)
    probs = np.asarray(pc.list_flatten(annotation.column("tag_probs").combine_chunks()), dtype=np.float32)
    limits = np.where(labels.is_character, rules.character_threshold, rules.general_threshold).astype(np.float32)
    passed = passes(probs, limits[ids], comparison=rules.comparison) if len(ids) else np.empty(0, dtype=bool)
    for kind in rules.mcut:
        is_kind = labels.is_character[ids] == (kind == "character")
        places = np.flatnonzero(is_kind)
        passed[places] &= mcut(rows[places], probs[places], floor=floor)
    rows, ids, probs = rows[passed], ids[passed], probs[passed]
    if rules.order == "confidence":
        order = np.lexsort((-probs, rows))
        rows, ids = rows[order], ids[order]
    tags = labels.tags[ids] if len(ids) else ids
    return TagStream(rows, tags).where(tags >= 0)


def mcut(rows: Ids, probs: Floats, *, floor: float) -> npt.NDArray[np.bool_]:
    """Return which entries stand above the largest gap among the sorted probabilities of their row.

    rows: (N,) ascending. The values that were not stored count as `floor`, their upper bound. The first of equal gaps
    counts. Source: Largeron, Moulin, Gery, "MCut: A Thresholding Strategy for Multi-label Classification", 2012.
    """
    if not len(rows):
        return np.empty(0, dtype=bool)
    order = np.lexsort((-probs, rows))
    sorted_rows, values = rows[order], probs[order].astype(np.float64)
    is_last = np.append(sorted_rows[1:] != sorted_rows[:-1], True)
    gaps = values - np.where(is_last, floor, np.append(values[1:], 0.0))
    starts = np.flatnonzero(np.append(True, is_last[:-1]))
    row_of = np.cumsum(np.append(True, is_last[:-1])) - 1
    is_largest = gaps == np.maximum.reduceat(gaps, starts)[row_of]
    # The first largest gap of a row: all entries up to it pass.
    places = np.where(is_largest, np.arange(len(gaps)), len(gaps))
    passed = np.empty(len(rows), dtype=bool)
    passed[order] = np.arange(len(gaps)) <= np.minimum.reduceat(places, starts)[row_of]
    return passed


def with_added(streams: Sequence[TagStream], known: LexiconArrays) -> list[TagStream]:
    """Return the streams and, behind them, the tags that they imply."""
    if not len(known.added):
        return list(streams)
    added = []
    for stream in streams:
        rows, tags = _related(stream, known.added_from, known.added)
        added.append(TagStream(rows, tags))
    return [*streams, *added]


def without_barred(streams: Sequence[TagStream], known: LexiconArrays, bits: Ids | None) -> list[TagStream]:
    """Return the streams without tags that the black list of a picture's source has.

    bits: (R,) by row, as `barred`; None: no source has a list.
    """
    if bits is None:
        return list(streams)
    return [stream.where(known.barred[stream.tags] & bits[stream.rows] == 0) for stream in streams]


def without_removed(streams: Sequence[TagStream], known: LexiconArrays) -> list[TagStream]:
    """Return the streams without tags that other tags of the same picture remove."""
    if not len(known.removed):
        return list(streams)
    num_tags = len(known.words)
    removed = []
    for stream in streams:
        rows, tags = _related(stream, known.removed_from, known.removed)
        removed.append(rows * num_tags + tags)
    value_set = pa.array(np.concatenate(removed) if removed else np.empty(0, dtype=np.int64))
    if not len(value_set):
        return list(streams)
    can_go = np.zeros(num_tags, dtype=bool)
    can_go[known.removed] = True
    kept = []
    for stream in streams:
        wanted = np.ones(len(stream.rows), dtype=bool)
        places = np.flatnonzero(can_go[stream.tags])
        keys = pa.array(stream.rows[places] * num_tags + stream.tags[places])
        wanted[places] = ~np.asarray(pc.is_in(keys, value_set=value_set))
        kept.append(stream.where(wanted))
    return kept


def _related(stream: TagStream, offsets: Ids, related: Ids) -> tuple[Ids, Ids]:
    """Return (row, related tag) for each entry and each tag that it is related to."""
    counts = offsets[stream.tags + 1] - offsets[stream.tags]
    places = np.flatnonzero(counts)
    counts = counts[places]
    rows = np.repeat(stream.rows[places], counts)
    ends = np.cumsum(counts)
    within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
    return rows, related[np.repeat(offsets[stream.tags[places]], counts) + within]
