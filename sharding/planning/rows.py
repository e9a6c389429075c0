"""Cut the keys of each dataset into chunks: a pure function of the previous plan and the kept keys.

Each dataset is shuffled by a seeded hash of its keys and cut, so every chunk is a uniform random sample of its
dataset. No files, no pixels, and no Python object per sample: millions of rows are a few hundred megabytes.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from sharding.keys import is_in, key_array, key_numbers
from sharding.planning.order import are_sealed, name_codes, places, shuffled_ranks, spans_of
from sharding.schema import PLAN

Array = np.ndarray[Any, Any]

CURRENT = pa.schema(
    [
        ("key", pa.string()),
        ("dataset", pa.string()),
        ("period", pa.string()),
        ("repeats", pa.int32()),
        ("loss_weight", pa.float32()),
    ]
)
"""Columns of the kept keys as planning takes them."""


def plan_rows(
    previous: pa.Table,
    current: pa.Table,
    *,
    chunk_size: int,
    seed: int,
    sealed: Collection[tuple[str, int]] = (),
) -> pa.Table:
    """Return the new plan (schema PLAN), sorted by dataset, chunk and position.

    previous: the plan so far, as this function returned it, or some of its rows, in their order; or empty.
    current: the kept keys (schema CURRENT), each once, in any order.
    sealed: (dataset, chunk) that a run has trained.

    A chunk of the previous plan is fixed when it is sealed, when it holds chunk_size rows or more, or when it is not
    its dataset's last; its keys stay, whether they are still kept or not. A short last chunk keeps its keys and is
    filled up with new ones. Repeats and loss weights are today's, except in sealed chunks.
    """
    keys = key_numbers(current.column("key"))
    previous_keys = key_numbers(previous.column("key"))
    previous = _reweighed(previous, current, places(keys, previous_keys), is_sealed=are_sealed(previous, sealed))
    spans = spans_of(*name_codes(previous.column("dataset")))
    is_fixed, open_chunks = _fixed_rows(previous, spans, chunk_size=chunk_size, sealed=sealed)
    is_free = places(previous_keys[is_fixed], keys) < 0
    names, codes = name_codes(current.column("dataset"))
    tables = [PLAN.empty_table()]
    for name in sorted({*spans, *names}):
        start, num_rows = spans.get(name, (0, 0))
        num_fixed = int(is_fixed[start : start + num_rows].sum())  # a dataset's fixed rows come first
        tables.append(_renumbered(previous.slice(start, num_fixed)))
        rows = np.flatnonzero(is_free & (codes == names.index(name))) if name in names else np.zeros(0, dtype=np.int64)
        if len(rows):
            stayed = previous_keys[start + num_fixed : start + num_rows]
            ranks = shuffled_ranks(key_array(current.column("key").take(pa.array(rows))), seed=seed, salt=name)
            rows = rows[_training_order(ranks, is_in(keys[rows], stayed), chunk_size=chunk_size)]
            tables.append(
                _cut(current.take(pa.array(rows)), chunk_size=chunk_size, first_chunk=open_chunks.get(name, 0))
            )
    return pa.concat_tables(tables)


def _fixed_rows(
    previous: pa.Table, spans: Mapping[str, tuple[int, int]], *, chunk_size: int, sealed: Collection[tuple[str, int]]
) -> tuple[Array, dict[str, int]]:
    """Return which rows stay where they are, and by dataset the chunk that the next row goes to."""
    chunks = previous.column("chunk").to_numpy()
    is_fixed = np.ones(previous.num_rows, dtype=bool)
    open_chunks: dict[str, int] = {}
    for name, (start, num_rows) in spans.items():
        last = int(chunks[start + num_rows - 1])
        num_in_last = int((chunks[start : start + num_rows] == last).sum())
        is_open = (name, last) not in sealed and num_in_last < chunk_size
        open_chunks[name] = last if is_open else last + 1
        if is_open:
            is_fixed[start + num_rows - num_in_last : start + num_rows] = False
    return is_fixed, open_chunks


def _training_order(ranks: Array, has_stayed: Array, *, chunk_size: int) -> Array:
    """Return the shuffled order of some rows; those that stay keep their place in the first chunk, in a new order."""
    by_age = np.lexsort((ranks, ~has_stayed))
    first = by_age[:chunk_size]
    return np.concatenate([first[np.argsort(ranks[first], kind="stable")], by_age[chunk_size:]])


def _renumbered(rows: pa.Table) -> pa.Table:
    """Close the gaps in the positions of a dataset's chunks that have lost rows."""
    if not rows.num_rows:
        return rows
    chunks = rows.column("chunk").to_numpy()
    starts = np.flatnonzero(np.diff(chunks, prepend=-2))
    lengths = np.diff(starts, append=len(chunks))
    positions = np.arange(len(chunks)) - np.repeat(starts, lengths)
    return _with_column(rows, "position", positions)


def _reweighed(previous: pa.Table, current: pa.Table, place: Array, *, is_sealed: Array) -> pa.Table:
    """Give rows the repeats and weights of `current`, except in sealed chunks and where nothing is known today.

    place: of each row, its row in `current`, or -1.
    """
    is_known = (place >= 0) & ~is_sealed
    if not is_known.any():
        return previous
    for name in ("repeats", "loss_weight"):
        today = current.column(name).to_numpy()[place]
        previous = _with_column(previous, name, np.where(is_known, today, previous.column(name).to_numpy()))
    return previous


def _with_column(rows: pa.Table, name: str, values: Array) -> pa.Table:
    field = PLAN.field(name)
    return rows.set_column(PLAN.get_field_index(name), field, pa.array(values, field.type))


def _cut(rows: pa.Table, *, chunk_size: int, first_chunk: int) -> pa.Table:
    numbers = np.arange(rows.num_rows)
    columns: dict[str, Any] = {
        "chunk": pa.array(first_chunk + numbers // chunk_size, pa.int32()),
        "position": pa.array(numbers % chunk_size, pa.int32()),
    }
    return pa.table([columns[name] if name in columns else rows.column(name) for name in PLAN.names], schema=PLAN)
