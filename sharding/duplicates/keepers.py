"""Decide which of several files of the same picture stays. Pure: arrays in, arrays out.

First files with the same key (identical bytes) become one. Then keys are connected by pairs (`pairs`), and each
connected component is cut into groups around a keeper each (`cut`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sharding.duplicates.cut import KINDS, RULES, AreVariants, Candidates, Flags, Members, Rows, cut_components
from sharding.duplicates.pairs import Pairs

REASONS = (
    "kept", "identical_bytes", "near_duplicate", "turned_copy", "cropped_copy", "better_copy_of_planned",
    "duplicate_of_reference", "reference", "dropped_by_decision",
)  # fmt: skip
"""What can become of a file; `Decision.reason` holds positions in it."""
_REASON_OF_KIND = np.array(
    [REASONS.index(reason) for reason in ("kept", "identical_bytes", "near_duplicate", "turned_copy", "cropped_copy")],
    dtype=np.int8,
)


@dataclass(frozen=True)
class Decision:
    """Per file. keeper: row of the file that stands for it, its own if it goes for no other; distance: bits to the
    keeper, -1 for a crop, which has none; kind: position in KINDS; reason: position in REASONS; rule: position in
    RULES of what decided for the keeper, for a keeper against its closest rival."""

    keeper: Rows
    distance: npt.NDArray[np.int32]
    kind: npt.NDArray[np.int8]
    reason: npt.NDArray[np.int8]
    rule: npt.NDArray[np.int8]
    component: Rows
    """Number of the connected component, by all pairs and before any cut; -1 for a file that is like no other."""
    num_degenerate: int
    num_cut_off: int
    """Pictures of a component that were too far from its best member to be dropped for it."""
    largest_component: int
    """Pictures in it; 0 without pairs."""

    @property
    def is_kept(self) -> Flags:
        is_kept: Flags = self.reason == 0
        return is_kept


def decide(
    candidates: Candidates,
    pairs: Pairs,
    *,
    max_diameter: int,
    order: Sequence[str],
    are_variants: AreVariants | None = None,
) -> Decision:
    """Decide for every file. order: names of RULES by which two pictures are compared, then the key."""
    num_files = len(candidates.key)
    own = np.arange(num_files)
    survivors, first = _collapse(candidates)
    edges = _edges(pairs, candidates.key[survivors], candidates.is_dropped[survivors])
    related = _components(edges, len(survivors))
    joins = pairs.is_duplicate[edges.number] & ~candidates.is_apart[survivors[edges.pairs]].any(axis=1)
    component = _components(edges.take(joins), len(survivors))
    members = np.flatnonzero(component >= 0)
    cut = cut_components(
        Members(candidates, survivors[members], component[members], order),
        _crop_codes(edges.take(joins), pairs, members),
        max_diameter=max_diameter,
        order=order,
        are_variants=are_variants,
    )

    keeper = own.copy()
    keeper[survivors[members]] = survivors[members][cut.keeper]
    distance = np.zeros(num_files, dtype=np.int32)
    distance[survivors[members]] = cut.distance
    kind = np.zeros(num_files, dtype=np.int8)
    kind[survivors[members]] = cut.kind
    rule = np.full(num_files, RULES.index("key"), dtype=np.int8)
    rule[survivors[members]] = cut.rule
    # A copy of a dropped picture goes with it, for the same reason.
    is_copy = first != own
    for values in (keeper, distance, kind, rule):
        values[is_copy] = values[first[is_copy]]
    stays = is_copy & (keeper == first)
    kind[stays], rule[stays] = KINDS.index("exact"), RULES.index("exact")
    alone = np.unique(first[stays])
    rule[alone[rule[alone] == RULES.index("key")]] = RULES.index("exact")
    return Decision(
        keeper, distance, kind, _reasons(candidates, keeper, kind, rule), rule,
        component=related[np.searchsorted(survivors, first)],
        num_degenerate=int((~candidates.is_comparable & ~candidates.is_dropped)[survivors].sum()),
        num_cut_off=cut.num_cut_off,
        largest_component=int(np.bincount(component[members]).max()) if len(members) else 0,
    )  # fmt: skip


def _reasons(
    candidates: Candidates, keeper: Rows, kind: npt.NDArray[np.int8], rule: npt.NDArray[np.int8]
) -> npt.NDArray[np.int8]:
    reason = _REASON_OF_KIND[kind]
    is_like = kind > KINDS.index("exact")
    reason[is_like & (rule == RULES.index("planned"))] = REASONS.index("better_copy_of_planned")
    reason[(kind > 0) & candidates.is_reference[keeper]] = REASONS.index("duplicate_of_reference")
    reason[candidates.is_reference] = REASONS.index("reference")
    reason[candidates.is_dropped] = REASONS.index("dropped_by_decision")
    return reason


def _collapse(candidates: Candidates) -> tuple[Rows, Rows]:
    """Return (one row per key, ascending; for every file the row of its key's).

    A reference stays, then the source with the highest priority, the older date, the first. What people have dropped
    is collapsed, too.
    """
    own = np.arange(len(candidates.key))
    by_key = np.lexsort((candidates.date, -candidates.priority, ~candidates.is_reference, candidates.key))
    is_first = np.ones(len(own), dtype=bool)
    is_first[1:] = candidates.key[by_key[1:]] != candidates.key[by_key[:-1]]
    first = np.empty(len(own), dtype=np.int64)
    first[by_key] = by_key[is_first][np.cumsum(is_first) - 1]
    return np.flatnonzero(first == own), first


# --- connected components ---


@dataclass(frozen=True)
class _Edges:
    """Pairs between survivors: (P, 2) positions among them, and each one's number in the pairs."""

    pairs: Rows
    number: Rows

    def take(self, chosen: Flags) -> "_Edges":
        return _Edges(self.pairs[chosen], self.number[chosen])


def _edges(pairs: Pairs, keys: npt.NDArray[np.uint64], is_dropped: Flags) -> _Edges:
    """Return the pairs whose pictures are both there."""
    if not len(pairs.left):
        return _Edges(np.empty((0, 2), np.int64), np.empty(0, np.int64))
    by_key = np.argsort(keys, kind="stable")
    ends = np.stack([by_key[np.searchsorted(keys, side, sorter=by_key)] for side in (pairs.left, pairs.right)], axis=1)
    number = np.flatnonzero(~is_dropped[ends].any(axis=1))
    return _Edges(ends[number], number)


def _components(edges: _Edges, num_nodes: int) -> Rows:
    """Return a component number per node, by first member; -1 for what has no edge."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    component = np.full(num_nodes, -1, dtype=np.int64)
    nodes, ends = np.unique(edges.pairs, return_inverse=True)
    if len(nodes):
        ends = ends.reshape(-1, 2)
        weights = np.ones(len(ends), np.int8)
        graph = coo_array((weights, (ends[:, 0], ends[:, 1])), shape=(len(nodes), len(nodes)))
        component[nodes] = connected_components(graph, directed=False)[1]
    return component


def _crop_codes(edges: _Edges, pairs: Pairs, members: Rows) -> Rows:
    """Return, sorted, left · M + right and right · M + left of each crop pair, by positions among the M members."""
    crops = np.searchsorted(members, edges.pairs[pairs.is_crop[edges.number]])
    return np.sort(np.concatenate([crops[:, 0] * len(members) + crops[:, 1], crops[:, 1] * len(members) + crops[:, 0]]))
