"""Cut connected components of like pictures into groups around a keeper each. Pure: arrays in, arrays out.

The best member of a component is its first keeper: whoever is within the diameter of it goes, whoever is not waits for
the next round, where the best of those left over is the keeper. So no picture is dropped for one that it is not near
to, however long the chain of pairs between them; a crop goes only for a keeper that it has a pair with.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RULES = ("exact", "reference", "planned", "preferred", "priority", "pixels", "lossless", "bytes", "date", "key")
"""What can decide; `Decision.rule` holds positions in it."""
KINDS = ("", "exact", "near", "turned", "crop")
"""How a file is like its keeper; `Decision.kind` holds positions in it."""

Rows = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
AreVariants = Callable[[Rows, Rows], Flags]
"""Tells of files (rows of Candidates) whether each pair of them is a picture and its variant."""

_NO_DISTANCE = -1


@dataclass(frozen=True)
class Candidates:
    """One entry per file, in manifest order."""

    key: npt.NDArray[np.uint64]
    phash: npt.NDArray[np.uint64]
    """(N, words)."""
    turned: npt.NDArray[np.uint64]
    """(N, turns, words): hashes of the turned picture."""
    is_comparable: Flags
    """The hash says something; that of a flat picture does not."""
    priority: npt.NDArray[np.int32]
    pixels: npt.NDArray[np.int64]
    lossless: Flags
    bytes: npt.NDArray[np.int64]
    date: npt.NDArray[np.int64]
    """Milliseconds; the largest number when unknown."""
    is_reference: Flags
    is_planned: Flags
    is_dropped: Flags
    """By decision: takes no part."""
    is_preferred: Flags
    is_protected: Flags
    """By decision: may keep others, is never dropped for one that is only like it."""
    is_apart: Flags
    """By decision: no duplicate of anything but identical bytes."""


class Members:
    """What the cut needs to know of the M pictures that are like another one."""

    def __init__(self, candidates: Candidates, rows: Rows, component: Rows, order: Sequence[str]) -> None:
        self.rows = rows
        self.component = component
        self.is_comparable = candidates.is_comparable[rows]
        self.phash = candidates.phash[rows]
        self.turned = candidates.turned[rows]
        self.is_reference = candidates.is_reference[rows]
        self.is_protected = candidates.is_protected[rows]
        self.is_planned = candidates.is_planned[rows]
        columns = {
            "priority": -candidates.priority[rows].astype(np.int64),
            "pixels": -candidates.pixels[rows],
            "lossless": -candidates.lossless[rows].astype(np.int64),
            "bytes": -candidates.bytes[rows],
            "date": candidates.date[rows],
        }
        firsts = [self.is_reference, self.is_planned, candidates.is_preferred[rows]]
        by_key = np.empty(len(rows), dtype=np.int64)
        by_key[np.argsort(candidates.key[rows], kind="stable")] = np.arange(len(rows))
        self.criteria = np.stack(
            [*(-flags.astype(np.int64) for flags in firsts), *(columns[name] for name in order), by_key]
        )
        """(rules, M): smaller wins; the first three are reference, planned, preferred; the last is the key."""

    def bits(self, left: Rows, right: Rows) -> npt.NDArray[np.int32]:
        bits: npt.NDArray[np.int32] = np.bitwise_count(self.phash[left] ^ self.phash[right]).sum(axis=1, dtype=np.int32)
        return bits

    def turned_bits(self, left: Rows, right: Rows) -> npt.NDArray[np.int32]:
        """Return the least number of bits between one of the two and a turn of the other."""
        bits = np.full(len(left), np.iinfo(np.int32).max, dtype=np.int32)
        for turn in range(self.turned.shape[1]):
            for one, other in ((left, right), (right, left)):
                differing = self.turned[one, turn] ^ self.phash[other]
                np.minimum(bits, np.bitwise_count(differing).sum(axis=1, dtype=np.int32), out=bits)
        return bits


@dataclass(frozen=True)
class Cut:
    """Per member. keeper: position among the members; the rest as in Decision."""

    keeper: Rows
    distance: npt.NDArray[np.int32]
    kind: npt.NDArray[np.int8]
    rule: npt.NDArray[np.int8]
    num_cut_off: int


def cut_components(
    members: Members,
    crop_codes: Rows,
    *,
    max_diameter: int,
    order: Sequence[str],
    are_variants: AreVariants | None,
) -> Cut:
    """Cut each component around its best member, then what is left around the best of that, and so on."""
    num_members = len(members.rows)
    keeper = np.arange(num_members)
    distance = np.zeros(num_members, dtype=np.int32)
    kind = np.zeros(num_members, dtype=np.int8)
    rule = np.full(num_members, RULES.index("key"), dtype=np.int8)
    left = np.lexsort((*members.criteria[::-1], members.component))
    num_cut_off = -1
    while len(left):
        starts = np.concatenate([[True], members.component[left[1:]] != members.component[left[:-1]]])
        best = left[starts][np.cumsum(starts) - 1]
        # A planned picture is in a chunk already: it stays, whatever else is planned; but never beside a reference.
        may_go = (left != best) & ~members.is_reference[left] & ~members.is_protected[left]
        may_go &= ~members.is_planned[left] | members.is_reference[best]
        like, bits = _likeness(members, left, best, may_go, crop_codes, max_diameter, are_variants)
        goes = like > 0
        gone = left[goes]
        keeper[gone], distance[gone], kind[gone] = best[goes], bits[goes], like[goes]
        rule[gone] = _deciding_rules(members.criteria[:, gone], members.criteria[:, best[goes]], order)
        # The members are sorted, so the first that goes is the keeper's closest rival.
        winners, rivals = np.unique(best[goes], return_index=True)
        rule[winners] = rule[gone[rivals]]
        if num_cut_off < 0:
            num_cut_off = int((may_go & ~goes).sum())
        left = left[~goes & (left != best)]
    return Cut(keeper, distance, kind, rule, num_cut_off=max(num_cut_off, 0))


def _likeness(
    members: Members,
    left: Rows,
    best: Rows,
    may_go: Flags,
    crop_codes: Rows,
    max_diameter: int,
    are_variants: AreVariants | None,
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int32]]:
    """Return how each of `left` is like its best (position in KINDS, 0 for not at all) and the bits between them."""
    like = np.zeros(len(left), dtype=np.int8)
    bits = np.zeros(len(left), dtype=np.int32)
    asked = np.flatnonzero(may_go)
    comparable = members.is_comparable[left] & members.is_comparable[best]
    bits[asked] = members.bits(left[asked], best[asked])
    near = asked[comparable[asked] & (bits[asked] <= max_diameter)]
    if are_variants is not None and len(near):
        variants = are_variants(members.rows[left[near]], members.rows[best[near]])
        asked = np.setdiff1d(asked, near[variants])
        near = near[~variants]
    like[near] = KINDS.index("near")
    asked = asked[like[asked] == 0]
    if members.turned.shape[1]:
        hashed = asked[comparable[asked]]
        turned_bits = members.turned_bits(left[hashed], best[hashed])
        turned = hashed[turned_bits <= max_diameter]
        like[turned], bits[turned] = KINDS.index("turned"), turned_bits[turned_bits <= max_diameter]
    asked = asked[like[asked] == 0]
    if len(crop_codes) and len(asked):
        codes = left[asked] * len(members.rows) + best[asked]
        places = np.minimum(np.searchsorted(crop_codes, codes), len(crop_codes) - 1)
        crops = asked[crop_codes[places] == codes]
        like[crops], bits[crops] = KINDS.index("crop"), _NO_DISTANCE
    return like, bits


def _deciding_rules(
    losers: npt.NDArray[np.int64], winners: npt.NDArray[np.int64], order: Sequence[str]
) -> npt.NDArray[np.int8]:  # fmt: skip
    """Return what decided: `reference`, or the first criterion that differs, but `planned` only where the loser is
    the better copy."""
    names = ("preferred", *order, "key")
    differs = losers[2:] != winners[2:]
    first = differs.argmax(axis=0)
    columns = np.arange(losers.shape[1])
    is_better = losers[2:][first, columns] < winners[2:][first, columns]
    positions = np.array([RULES.index(name) for name in names], dtype=np.int8)
    rules = np.where(is_better, np.int8(RULES.index("planned")), positions[first]).astype(np.int8)
    rules[winners[0] < 0] = RULES.index("reference")
    return rules
