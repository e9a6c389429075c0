"""What must hold between chunks: each key in one plain chunk; what is held out, and its relatives, nowhere else.

Arrays of keys only, 16 bytes per sample; what is inside a chunk is `verify`'s work.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sharding.keys import key_numbers
from sharding.planning.order import KeyRows
from sharding.schema import RELATIVES, Workspace
from sharding.tables import read_parts


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it should be. key: of the sample, or "" when it concerns the chunk."""

    chunk: str
    what: str
    key: str = ""
    file: str = ""
    """What `repair` makes again: chunk.json, the index, or a shard as chunk.json names it; "" when it cannot help."""
    other: str = ""
    """The other chunk, when it is a problem between two."""

    def __str__(self) -> str:
        return f"chunk {self.chunk}: {f'key {self.key}: ' if self.key else ''}{self.what}"


@dataclass(frozen=True)
class CheckedChunk:
    """A chunk after its check. keys: as numbers; empty when the index cannot be read."""

    name: str
    problems: list[Problem]
    keys: np.ndarray[Any, Any]
    is_combined: bool = False
    is_held_out: bool = False


def problems_between(workspace: Workspace, checked: Sequence[CheckedChunk]) -> Iterator[Problem]:
    """Yield what is wrong between some chunks, judged by their keys and by `dedupe/relatives`."""
    plain = [one for one in checked if not one.is_combined]
    yield from _shared_keys(plain)
    held_out = [one for one in plain if one.is_held_out]
    if not held_out:
        return
    trained = [one for one in checked if not one.is_held_out]
    out, mixed = _side(held_out), _side([one for one in trained if one.is_combined])
    for name, key, other in _meetings(out, mixed, out[0], mixed[0]):
        yield Problem(
            name, f"is held out in {other}; run `python -m sharding combine` again", f"{key:016x}", other=other
        )
    relatives = read_parts(workspace.dedupe / "relatives", schema=RELATIVES)
    if not relatives.num_rows:
        return
    finder = KeyRows(key_numbers(relatives.column("key")))
    components = relatives.column("component").to_numpy()
    sides = []
    for keys, chunks, names in (out, _side(trained)):
        rows = finder.of(keys)
        is_related = rows >= 0
        sides.append(((keys[is_related], chunks[is_related], names), components[rows[is_related]]))
    (out, out_groups), (others, groups) = sides
    for name, key, other in _meetings(out, others, out_groups, groups):
        what = f"has a relative that is held out in {other}; run `plan` and `pack` again"
        yield Problem(name, what, f"{key:016x}", other=other)


def _shared_keys(plain: Sequence[CheckedChunk]) -> Iterator[Problem]:
    keys, chunks, names = _side(plain)
    order = np.lexsort((chunks, keys))
    keys, chunks = keys[order], chunks[order]
    for row in np.flatnonzero((keys[1:] == keys[:-1]) & (chunks[1:] != chunks[:-1])).tolist():
        name, other = names[chunks[row + 1]], names[chunks[row]]
        what = f"stands in {other}, too; pack both again after `plan`"
        yield Problem(name, what, f"{int(keys[row]):016x}", other=other)


_Side = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], list[str]]
"""Keys of some chunks, each key's chunk as a number, and the chunks' names."""


def _side(checked: Sequence[CheckedChunk]) -> _Side:
    keys = np.concatenate([np.empty(0, np.uint64), *(one.keys for one in checked)])
    chunks = np.repeat(np.arange(len(checked)), [len(one.keys) for one in checked])
    return keys, chunks, [one.name for one in checked]


def _meetings(
    held_out: _Side, trained: _Side, held_out_marks: np.ndarray[Any, Any], trained_marks: np.ndarray[Any, Any]
) -> Iterator[tuple[str, int, str]]:
    """Yield (chunk, key, held-out chunk) of each trained row whose mark, a key or a component, is held out, too."""
    marks, first = np.unique(held_out_marks, return_index=True)
    at = KeyRows(marks).of(trained_marks)
    for row in np.flatnonzero(at >= 0).tolist():
        other = held_out[2][held_out[1][first[at[row]]]]
        yield trained[2][trained[1][row]], int(trained[0][row]), other
