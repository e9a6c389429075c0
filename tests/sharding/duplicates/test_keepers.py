from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.duplicates.cut import RULES, Candidates
from sharding.duplicates.keepers import REASONS, decide
from sharding.duplicates.pairs import PairRules, Pictures, find_pairs

ORDER = ("priority", "pixels", "lossless", "bytes", "date")


def candidates_of(key, phash, **columns):
    """Candidates that are equal but for what is given."""
    count = len(key)
    no, ones = np.zeros(count, dtype=bool), np.ones(count, dtype=np.int64)
    defaults = {
        "turned": np.zeros((count, 0, phash.shape[1]), np.uint64), "is_comparable": ~no, "priority": ones,
        "pixels": ones,
        "lossless": no, "bytes": ones, "date": ones, "is_reference": no, "is_planned": no, "is_dropped": no,
        "is_preferred": no, "is_protected": no, "is_apart": no,
    }  # fmt: skip
    return Candidates(key=key.astype(np.uint64), phash=phash, **defaults | columns)


def pairs_of(candidates, radius, **rules):
    key, first = np.unique(candidates.key, return_index=True)
    pictures = Pictures(key, candidates.phash[first], candidates.turned[first], candidates.is_comparable[first])
    return find_pairs(pictures, PairRules(radius=radius, **rules), np.ones(len(key), dtype=bool))


def decide_all(candidates, radius, *, max_diameter, order=ORDER, are_variants=None, **rules):
    pairs = pairs_of(candidates, radius, **rules)
    return decide(candidates, pairs, max_diameter=max_diameter, order=order, are_variants=are_variants)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_decision_holds_its_promises(data):
    num_files = data.draw(st.integers(1, 30))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    key = rng.integers(0, num_files, num_files).astype(np.uint64)
    bases = rng.integers(0, 2**64, (3, 1), dtype=np.uint64)
    hash_of_key = bases[rng.integers(0, 3, num_files)] ^ (
        np.uint64(1) << rng.integers(0, 9, (num_files, 1)).astype("u8")
    )
    candidates = candidates_of(
        key,
        hash_of_key[key.astype(int)],
        is_planned=(rng.random(num_files) < 0.2)[key.astype(int)],
        priority=rng.integers(0, 2, num_files),
        pixels=rng.integers(1, 4, num_files)[key.astype(int)],
        lossless=(rng.random(num_files) < 0.5)[key.astype(int)],
        bytes=rng.integers(1, 4, num_files)[key.astype(int)],
        date=rng.integers(0, 3, num_files),
    )

    decision = decide_all(candidates, 1, max_diameter=2)

    keeper = decision.keeper
    assert np.array_equal(keeper[keeper], keeper)  # a keeper is kept
    assert len(set(key[np.unique(keeper)])) == len(np.unique(keeper))  # a key is kept once
    bits = np.bitwise_count(candidates.phash ^ candidates.phash[keeper]).sum(axis=1)
    assert (bits <= 2).all() and np.array_equal(bits, decision.distance)
    assert set(key[candidates.is_planned]) <= set(key[np.unique(keeper)])
    assert all(RULES[rule] for rule in decision.rule)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 8))
def test_planning_any_of_the_kept_keeps_the_same_ones(seed, max_diameter):
    rng = np.random.default_rng(seed)
    num_files = 24
    bits = np.uint64(1) << rng.integers(0, 64, (num_files, 4)).astype(np.uint64)
    candidates = candidates_of(
        np.arange(num_files),
        (np.uint64(0x5555555555555555) ^ np.bitwise_xor.reduce(bits, axis=1)).reshape(-1, 1),
        pixels=rng.integers(1, 9, num_files),
    )
    before = decide_all(candidates, 6, max_diameter=max_diameter, order=("pixels",))
    kept = before.keeper == np.arange(num_files)

    planned = replace(candidates, is_planned=kept & (rng.random(num_files) < 0.5))
    after = decide_all(planned, 6, max_diameter=max_diameter, order=("pixels",))

    assert ((after.keeper == np.arange(num_files)) == kept).all()


# --- turns, crops, variants, references, decisions ---

BASE = 0x5A5A_C3C3_F00F_1234


def hashes(*flipped):
    """One hash per argument: BASE with these bits flipped."""
    values = [BASE ^ sum(1 << bit for bit in bits) for bits in flipped]
    return np.array(values, dtype=np.uint64).reshape(-1, 1)


def fates(decision):
    return [REASONS[reason] for reason in decision.reason]


def flags(count, *chosen):
    result = np.zeros(count, dtype=bool)
    result[list(chosen)] = True
    return result


def test_a_turned_copy_is_found_from_either_side_and_dropped_as_such():
    phash = np.array([[BASE], [0x0123456789ABCDEF], [0x0F1E2D3C4B5A6978]], dtype=np.uint64)
    turned = np.array([[[7]], [[BASE ^ 1]], [[9]]], dtype=np.uint64)
    candidates = candidates_of(np.arange(3), phash, turned=turned, pixels=np.array([5, 9, 9]))

    decision = decide_all(candidates, 4, max_diameter=8)

    assert fates(decision) == ["turned_copy", "kept", "kept"]
    assert (decision.keeper[0], decision.distance[0]) == (1, 1)


def test_a_crop_goes_only_for_a_keeper_that_it_has_a_pair_with():
    """whole (0) ~ crop (1) by a crop pair; crop (1) ~ its copy (2) by hash; the copy has no pair with the whole."""
    phash = np.array([[BASE], [0x0123456789ABCDEF], [0x0123456789ABCDEE]], dtype=np.uint64)
    candidates = candidates_of(np.arange(3), phash, pixels=np.array([9, 5, 4]))

    decision = decide_all(candidates, 4, max_diameter=8, find_crops=lambda: np.array([[0, 1]]))

    assert fates(decision) == ["kept", "cropped_copy", "kept"]
    assert (decision.keeper.tolist(), decision.distance[1], decision.num_cut_off) == ([0, 0, 2], -1, 1)
    assert len(set(decision.component)) == 1 and decision.largest_component == 3


def test_a_variant_is_no_duplicate_of_its_keeper_even_through_a_third():
    """0 ~ 1 and 1 ~ 2 are near; 2 is a variant of 0, the keeper: it stays, as a relative."""
    candidates = candidates_of(np.arange(3), hashes((), (1,), (1, 2)), pixels=np.array([9, 5, 4]))

    def are_variants(left, right):
        return np.abs(left - right) == 2

    decision = decide_all(candidates, 1, max_diameter=8, are_variants=are_variants)

    assert fates(decision) == ["kept", "near_duplicate", "kept"]
    assert decision.component[0] == decision.component[2] >= 0


def test_a_reference_wins_over_everything_and_is_not_kept():
    candidates = candidates_of(
        np.array([1, 2, 3, 3]), hashes((), (1,), (2,), (2,)), pixels=np.array([1, 9, 9, 9]),
        is_reference=flags(4, 0), is_planned=flags(4, 1), is_protected=flags(4, 2, 3),
    )  # fmt: skip

    decision = decide_all(candidates, 4, max_diameter=8)

    assert fates(decision) == ["reference", "duplicate_of_reference", "kept", "identical_bytes"]
    assert RULES[decision.rule[1]] == "reference"


def test_a_reference_takes_identical_files_of_any_priority():
    candidates = candidates_of(
        np.array([7, 7]), hashes((), ()), priority=np.array([9, 0], np.int32), is_reference=flags(2, 1)
    )

    assert fates(decide_all(candidates, 4, max_diameter=8)) == ["duplicate_of_reference", "reference"]


def test_people_decide_last():
    count = 6
    phash = hashes((), (1,), (2,), (3,), (4,), (5,))
    pixels = np.array([9, 8, 7, 6, 5, 4])
    plain = candidates_of(np.arange(count), phash, pixels=pixels)
    assert fates(decide_all(plain, 4, max_diameter=8)) == ["kept"] + ["near_duplicate"] * 5

    decided = replace(
        plain, is_dropped=flags(count, 0), is_apart=flags(count, 1), is_protected=flags(count, 2),
        is_preferred=flags(count, 4),
    )  # fmt: skip
    decision = decide_all(decided, 4, max_diameter=8)

    assert fates(decision) == [
        "dropped_by_decision", "kept", "kept", "near_duplicate", "kept", "near_duplicate",
    ]  # fmt: skip
    assert decision.keeper[3] == decision.keeper[5] == 4 and RULES[decision.rule[3]] == "preferred"


def test_a_planned_picture_stays_over_a_preferred_one():
    candidates = candidates_of(np.arange(2), hashes((), (1,)), is_planned=flags(2, 0), is_preferred=flags(2, 1))

    assert fates(decide_all(candidates, 4, max_diameter=8)) == ["kept", "better_copy_of_planned"]


def test_a_chain_is_told():
    chain = [tuple(range(4 * n)) for n in range(6)]
    candidates = candidates_of(np.arange(6), hashes(*chain))

    decision = decide_all(candidates, 4, max_diameter=8)

    assert (decision.largest_component, decision.num_cut_off) == (6, 3)
