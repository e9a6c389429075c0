from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.cut import RULES, Candidates
from sharding.keepers import decide
from sharding.pairs import PairRules, Pictures, find_pairs

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
