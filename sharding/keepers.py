"""Decide which of several files of the same picture stays. Pure: arrays in, arrays out.

First files with the same key (identical bytes) become one. Then keys are connected by near hashes, and each connected
component is cut around its best member: whoever is within the diameter goes, whoever is not waits for the next round,
where the best of those left over is the keeper. So no picture is dropped for one that it is not near to.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sharding.phash import are_degenerate

RULES = ("exact", "planned", "priority", "pixels", "lossless", "bytes", "date", "key")
"""What can decide; `Decision.rule` holds positions in it."""


@dataclass(frozen=True)
class Candidates:
    """One entry per file, in manifest order."""

    key: npt.NDArray[np.uint64]
    phash: npt.NDArray[np.uint64]
    """(N, words)."""
    is_planned: npt.NDArray[np.bool_]
    priority: npt.NDArray[np.int64]
    pixels: npt.NDArray[np.int64]
    lossless: npt.NDArray[np.bool_]
    bytes: npt.NDArray[np.int64]
    date: npt.NDArray[np.int64]
    """Seconds; the largest number when unknown."""

    def take(self, rows: npt.NDArray[np.int64]) -> "Candidates":
        return Candidates(**{name: values[rows] for name, values in vars(self).items()})


@dataclass(frozen=True)
class Decision:
    """Per file. keeper: row of the file that stays (its own row if it does); distance: bits between them; rule:
    position in RULES of what decided for the keeper, for a keeper against its closest rival."""

    keeper: npt.NDArray[np.int64]
    distance: npt.NDArray[np.int32]
    rule: npt.NDArray[np.int8]
    num_degenerate: int


def decide(candidates: Candidates, *, radius: int, max_diameter: int, order: Sequence[str]) -> Decision:
    """Decide for every file. order: names of RULES by which two pictures are compared, then the key."""
    num_files = len(candidates.key)
    keeper = np.arange(num_files)
    distance = np.zeros(num_files, dtype=np.int32)
    rule = np.full(num_files, RULES.index("key"), dtype=np.int8)

    # --- identical bytes: the source with the highest priority stays, then the older date, then the first ---
    by_key = np.lexsort((keeper, candidates.date, -candidates.priority, candidates.key))
    is_first = np.ones(num_files, dtype=bool)
    is_first[1:] = candidates.key[by_key[1:]] != candidates.key[by_key[:-1]]
    survivors = by_key[is_first]
    keeper[by_key] = survivors[np.cumsum(is_first) - 1]
    rule[keeper != np.arange(num_files)] = RULES.index("exact")
    rule[np.unique(keeper[keeper != np.arange(num_files)])] = RULES.index("exact")

    # --- near-duplicates among what is left ---
    survivors = np.sort(survivors)
    criteria = _criteria(candidates, order)[:, survivors]
    hashes = candidates.phash[survivors]
    comparable = ~are_degenerate(hashes)
    component = _components(hashes, comparable, radius)
    near_keeper, near_distance, near_rule = _cut_components(component, criteria, hashes, max_diameter, order)
    changed = near_rule >= 0
    rule[survivors[changed]] = near_rule[changed]
    distance[survivors] = near_distance
    keeper_of_survivor = np.arange(num_files)
    keeper_of_survivor[survivors] = survivors[near_keeper]
    # An identical copy of a dropped picture goes with it, for the same reason.
    first = keeper.copy()
    keeper = keeper_of_survivor[first]
    moved = (first != np.arange(num_files)) & (keeper != first)
    rule[moved], distance[moved] = rule[first[moved]], distance[first[moved]]
    return Decision(keeper, distance, rule, num_degenerate=int((~comparable).sum()))


def _criteria(candidates: Candidates, order: Sequence[str]) -> npt.NDArray[np.int64]:
    """(rules, N): smaller wins; planned first, then `order`. The key is compared apart, as unsigned."""
    columns = {
        "priority": -candidates.priority,
        "pixels": -candidates.pixels,
        "lossless": -candidates.lossless.astype(np.int64),
        "bytes": -candidates.bytes,
        "date": candidates.date,
        "key": np.argsort(np.argsort(candidates.key, kind="stable"), kind="stable"),
    }
    rows = [-candidates.is_planned.astype(np.int64), *(columns[name] for name in (*order, "key"))]
    return np.stack(rows)


def _components(
    hashes: npt.NDArray[np.uint64], comparable: npt.NDArray[np.bool_], radius: int
) -> npt.NDArray[np.int64]:  # fmt: skip
    """Return a component number per row; -1 for what has no near neighbour or cannot be compared."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    from sharding.neighbours import near_pairs, unique_hashes

    component = np.full(len(hashes), -1, dtype=np.int64)
    rows = np.nonzero(comparable)[0]
    if not len(rows):
        return component
    distinct, inverse = unique_hashes(hashes[rows])
    pairs = near_pairs(distinct, radius)
    edges = coo_array((np.ones(len(pairs.left), np.int8), (pairs.left, pairs.right)), shape=(len(distinct),) * 2)
    _, label = connected_components(edges, directed=False)
    size = np.bincount(label[inverse])
    component[rows] = np.where(size[label[inverse]] > 1, label[inverse], -1)
    return component


def _cut_components(
    component: npt.NDArray[np.int64],
    criteria: npt.NDArray[np.int64],
    hashes: npt.NDArray[np.uint64],
    max_diameter: int,
    order: Sequence[str],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.int8]]:
    """Return (keeper, distance, rule) per row; rule is -1 for rows in no group."""
    keeper = np.arange(len(component))
    distance = np.zeros(len(component), dtype=np.int32)
    rule = np.full(len(component), -1, dtype=np.int8)
    left = np.nonzero(component >= 0)[0]
    left = left[np.lexsort((*criteria[::-1, left], component[left]))]
    while len(left):
        starts = np.concatenate([[True], component[left[1:]] != component[left[:-1]]])
        best = left[starts][np.cumsum(starts) - 1]
        bits = np.bitwise_count(hashes[left] ^ hashes[best]).sum(axis=1, dtype=np.int32)
        # A planned picture is in a chunk already: it stays, whatever else is planned in its group.
        goes = (left != best) & (bits <= max_diameter) & (criteria[0, left] == 0)
        gone = left[goes]
        keeper[gone], distance[gone] = best[goes], bits[goes]
        rule[gone] = _deciding_rules(criteria[:, gone], criteria[:, best[goes]], order)
        # The members are sorted, so the first that goes is the keeper's closest rival.
        winners, rivals = np.unique(best[goes], return_index=True)
        rule[winners] = rule[gone[rivals]]
        left = left[~goes & (left != best)]
    return keeper, distance, rule


def _deciding_rules(
    losers: npt.NDArray[np.int64], winners: npt.NDArray[np.int64], order: Sequence[str]
) -> npt.NDArray[np.int8]:  # fmt: skip
    """Return what decided: the first criterion that differs, but `planned` only where the loser is the better copy."""
    names = (*order, "key")
    differs = losers[1:] != winners[1:]
    first = differs.argmax(axis=0)
    columns = np.arange(losers.shape[1])
    is_better = losers[1:][first, columns] < winners[1:][first, columns]
    positions = np.array([RULES.index(name) for name in names], dtype=np.int8)
    return np.where(is_better, np.int8(RULES.index("planned")), positions[first]).astype(np.int8)
