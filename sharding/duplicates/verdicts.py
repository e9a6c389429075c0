"""The tables in which dedupe says what it did and why: drops, groups, relatives. Pure but for reading the manifest.

Built column by column: millions of drops are a few hundred megabytes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sharding.decisions import Decisions
from sharding.duplicates.candidates import Places
from sharding.duplicates.cut import KINDS, RULES, Candidates
from sharding.duplicates.keepers import REASONS, Decision
from sharding.keys import key_texts
from sharding.pictures.phash import Turn
from sharding.schema import DROPS, GROUPS, RELATIVES

_BATCH_ROWS = 50_000
_DESCRIBED = ("source", "path", "width", "height", "format", "num_bytes")
_INVERSE: dict[Turn, Turn] = {"rotate_90": "rotate_270", "rotate_270": "rotate_90"}


def make_drops(
    candidates: Candidates, places: Places, decision: Decision, decisions: Decisions, turns: Sequence[Turn]
) -> pa.Table:
    """Return a row of DROPS for every file that is not kept, in manifest order."""
    dropped = np.flatnonzero(~decision.is_kept)
    keeper = decision.keeper[dropped]
    described, inverse = np.unique(np.concatenate([dropped, keeper]), return_inverse=True)
    facts = places.read(described, _DESCRIBED)
    own, others = inverse[: len(dropped)], inverse[len(dropped) :]
    is_like = ~np.isin(decision.reason[dropped], [REASONS.index("reference"), REASONS.index("dropped_by_decision")])
    keys = key_texts(candidates.key[dropped])
    details = [
        pa.array(
            _details(
                _Batch(dropped[rows], keeper[rows], facts.take(own[rows]), facts.take(others[rows]), keys[rows]),
                candidates, decision, decisions, turns,
            ),
            pa.string(),
        )
        for rows in (slice(start, start + _BATCH_ROWS) for start in range(0, len(dropped), _BATCH_ROWS))
    ]  # fmt: skip
    distance = decision.distance[dropped]
    columns = {
        "key": keys,
        "source": facts.column("source").take(pa.array(own)),
        "path": facts.column("path").take(pa.array(own)),
        "stage": pa.repeat("dedupe", len(dropped)),
        "reason": _names(decision.reason[dropped], REASONS),
        "kept_key": pc.if_else(pa.array(is_like), key_texts(candidates.key[keeper]), ""),
        "distance": pa.array(distance, pa.int32(), mask=~is_like | (distance < 0)),
        "detail": pa.chunked_array(details, pa.string()),
    }
    return pa.table([columns[name] for name in DROPS.names], schema=DROPS)


def make_groups(candidates: Candidates, decision: Decision) -> pa.Table:
    """Return a row of GROUPS per member, keepers first; groups are numbered by the manifest order of their keepers."""
    own = np.arange(len(decision.keeper))
    gone = own[(decision.keeper != own) & (decision.reason != REASONS.index("dropped_by_decision"))]
    keepers = np.unique(decision.keeper[gone])
    members = np.concatenate([keepers, gone])
    numbers = np.searchsorted(keepers, decision.keeper[members])
    order = np.lexsort((members, decision.keeper[members] != members, numbers))
    members, numbers = members[order], numbers[order]
    columns = {
        "group": pa.array(numbers, pa.int64()),
        "key": key_texts(candidates.key[members]),
        "is_keeper": pa.array(decision.keeper[members] == members),
        "distance": pa.array(decision.distance[members], pa.int32(), mask=decision.distance[members] < 0),
        "rule": _names(decision.rule[members], RULES),
        "kind": _names(decision.kind[members], KINDS),
    }
    return pa.table([columns[name] for name in GROUPS.names], schema=GROUPS)


def make_relatives(candidates: Candidates, decision: Decision) -> pa.Table:
    """Return the kept keys that share a component with another kept key, by component and key.

    Components are numbered by their smallest kept key.
    """
    rows = np.flatnonzero(decision.is_kept & (decision.component >= 0))
    rows = rows[np.argsort(candidates.key[rows], kind="stable")]
    _, first, inverse, counts = np.unique(
        decision.component[rows], return_index=True, return_inverse=True, return_counts=True
    )
    is_shared = counts > 1
    number = np.full(len(first), -1, dtype=np.int64)
    number[np.flatnonzero(is_shared)[np.argsort(first[is_shared])]] = np.arange(int(is_shared.sum()))
    shared = np.flatnonzero(is_shared[inverse]) if len(rows) else np.empty(0, np.int64)
    shared = shared[np.argsort(number[inverse[shared]], kind="stable")]
    return pa.table(
        [pa.array(number[inverse[shared]], pa.int64()), key_texts(candidates.key[rows[shared]])], schema=RELATIVES
    )


def which_turn(candidates: Candidates, dropped: int, keeper: int, turns: Sequence[Turn]) -> Turn:
    """Return the turn of the keeper that the dropped one is."""
    turned_keeper = np.bitwise_count(candidates.turned[keeper] ^ candidates.phash[dropped]).sum(axis=1)
    turned_dropped = np.bitwise_count(candidates.turned[dropped] ^ candidates.phash[keeper]).sum(axis=1)
    if turned_keeper.min() <= turned_dropped.min():
        return turns[int(turned_keeper.argmin())]
    turn = turns[int(turned_dropped.argmin())]
    return _INVERSE.get(turn, turn)


def _names(positions: npt.NDArray[np.int8], names: Sequence[str]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(positions), pa.array(names)).cast(pa.string())


@dataclass(frozen=True)
class _Batch:
    dropped: npt.NDArray[np.int64]
    keeper: npt.NDArray[np.int64]
    facts: pa.Table
    keeper_facts: pa.Table
    keys: pa.Array


def _details(
    batch: _Batch, candidates: Candidates, decision: Decision, decisions: Decisions, turns: Sequence[Turn]
) -> Iterator[str]:
    said = {row["key"]: f"{row['who']}: {row['why']}".strip(": ") for row in decisions.of(batch.keys).to_pylist()}
    rows, keepers, keys = batch.facts.to_pylist(), batch.keeper_facts.to_pylist(), batch.keys.to_pylist()
    for row, kept, key, place, keeper in zip(rows, keepers, keys, batch.dropped, batch.keeper, strict=True):
        reason = REASONS[decision.reason[place]]
        if reason == "dropped_by_decision":
            yield said.get(key, "")
        elif reason == "reference":
            yield f"source {row['source']} is a reference"
        else:
            is_turned = KINDS[decision.kind[place]] == "turned"
            turn = f"{which_turn(candidates, place, keeper, turns)}, " if is_turned else ""
            yield (
                f"{turn}{RULES[decision.rule[place]]}: {_describe(row)}; "
                f"kept {kept['source']}/{kept['path']} {_describe(kept)}"
            )


def _describe(row: dict[str, Any]) -> str:
    return f"{row['width']}x{row['height']} {row['format']} {row['num_bytes']:,} bytes"
