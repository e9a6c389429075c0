"""The table of pairs: any sequence of increments and removals gives what a full search gives, byte for byte."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.duplicates.pairs import PairRules, Pictures, find_pairs, read_pairs, update_pairs
from sharding.schema import PAIR_KINDS
from sharding.tables import part_metadata

NUM_KEYS = 60


def universe(seed, *, num_hashes=25, words=1, turns=1):
    """Pictures of which many have the same hash or hashes and turned hashes near to each other."""
    rng = np.random.default_rng(seed)
    bases = rng.integers(0, 2**64, (4, words), dtype=np.uint64)
    distinct = bases[rng.integers(0, 4, num_hashes)]
    for _ in range(3):
        distinct[:, 0] ^= np.uint64(1) << rng.integers(0, 64, num_hashes).astype(np.uint64)
    hash_of = rng.integers(0, num_hashes, NUM_KEYS)
    turned = bases[rng.integers(0, 4, (NUM_KEYS, turns))] ^ np.uint64(5)
    return Pictures(
        np.sort(rng.choice(2**62, NUM_KEYS, replace=False).astype(np.uint64)),
        distinct[hash_of],
        turned,
        rng.random(num_hashes)[hash_of] < 0.9,
    )


def some(pictures, rows):
    return Pictures(*(values[rows] for values in vars(pictures).values()))


def rules_for(pictures):
    """Near pairs whose keys add up to an odd number are variants; keys with the same last byte are crops."""

    def are_variants(left, right):
        return (pictures.key[left] + pictures.key[right]) % np.uint64(2) == 1

    def find_crops():
        left, right = np.triu_indices(len(pictures.key), 1)
        same = (pictures.key[left] ^ pictures.key[right]) % np.uint64(16) == 0
        same &= len(pictures.key) % 7 > 0  # crops may depend on the whole set
        return np.stack([left[same], right[same]], axis=1)

    return PairRules(radius=6, name="test", are_variants=are_variants, find_crops=find_crops)


def digests(pictures, parts):
    named = []
    for rows in parts:
        part = some(pictures, rows)
        digest = hashlib.sha256(b"".join(np.ascontiguousarray(v).tobytes() for v in vars(part).values())).hexdigest()
        named.append((digest, part.key))
    return named


def update(path, pictures, parts):
    """Search the pictures that stand in these parts, each a list of rows of the universe."""
    there = np.unique(np.concatenate([np.asarray(rows, dtype=np.int64) for rows in parts]))
    present = some(pictures, there)
    return update_pairs(path, present, rules_for(present), parts=digests(pictures, parts))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_increments_removals_and_changes_give_what_a_full_search_gives(tmp_path_factory, data):
    tmp_path = tmp_path_factory.mktemp("pairs")
    pictures = universe(data.draw(st.integers(0, 10_000)))
    rows = st.lists(st.integers(0, NUM_KEYS - 1), min_size=1, max_size=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sharding.duplicates.pairs.CROWD", data.draw(st.sampled_from([1, 2, 3, 100])))
        parts = data.draw(st.lists(rows, min_size=1, max_size=4))
        update(tmp_path / "grown.parquet", pictures, parts)
        for _ in range(data.draw(st.integers(1, 4))):
            change = data.draw(st.sampled_from(["add", "remove", "replace"]))
            if change == "add" or len(parts) < 2:
                parts = [*parts, data.draw(rows)]
            else:
                parts = [*parts]
                place = data.draw(st.integers(0, len(parts) - 1))
                parts[place : place + 1] = [] if change == "remove" else [data.draw(rows)]
            update(tmp_path / "grown.parquet", pictures, parts)

        update(tmp_path / "whole.parquet", pictures, parts)

    assert (tmp_path / "grown.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_only_what_is_new_is_searched(tmp_path):
    pictures = universe(1, num_hashes=NUM_KEYS)
    _, first = update(tmp_path / "pairs.parquet", pictures, [range(50)])
    _, second = update(tmp_path / "pairs.parquet", pictures, [range(50), range(50, 53)])
    _, third = update(tmp_path / "pairs.parquet", pictures, [range(50), range(50, 53)])

    assert first == 50 and 3 <= second < 15 and third == 0


def test_pairs_by_other_rules_are_searched_again(tmp_path):
    pictures = universe(2)
    path = tmp_path / "pairs.parquet"
    parts = digests(pictures, [range(NUM_KEYS)])
    update_pairs(path, pictures, PairRules(radius=6), parts=parts)
    path_digest = part_metadata(path)["made_from"]

    narrow, num_searched = update_pairs(path, pictures, PairRules(radius=3), parts=parts)

    assert num_searched == NUM_KEYS and (narrow.distance <= 3).all()
    assert part_metadata(path)["made_from"] != path_digest


def test_a_damaged_table_is_made_again_and_a_dry_run_writes_nothing(tmp_path):
    pictures = universe(3)
    path = tmp_path / "pairs.parquet"
    parts = digests(pictures, [range(NUM_KEYS)])
    path.write_bytes(b"not parquet")

    update_pairs(path, pictures, PairRules(radius=6), parts=parts, dry_run=True)
    assert path.read_bytes() == b"not parquet"

    pairs, _ = update_pairs(path, pictures, PairRules(radius=6), parts=parts)
    stored = read_pairs(path)
    assert all(np.array_equal(getattr(pairs, name), getattr(stored, name)) for name in vars(pairs))


def test_each_pair_stands_once_with_the_kind_that_says_most():
    pictures = universe(4, turns=2)

    pairs = find_pairs(pictures, rules_for(pictures), np.ones(NUM_KEYS, dtype=bool))

    assert (pairs.left < pairs.right).all()
    assert len(set(zip(pairs.left, pairs.right, strict=True))) == len(pairs.left)
    assert {PAIR_KINDS[kind] for kind in pairs.kind} == set(PAIR_KINDS)
    row = {int(key): number for number, key in enumerate(pictures.key)}
    for left, right, distance, kind in zip(pairs.left, pairs.right, pairs.distance, pairs.kind, strict=True):
        one, other = row[int(left)], row[int(right)]
        near = int(np.bitwise_count(pictures.phash[one] ^ pictures.phash[other]).sum())
        turned = min(
            int(np.bitwise_count(pictures.turned[a] ^ pictures.phash[b]).sum(axis=1).min())
            for a, b in ((one, other), (other, one))
        )
        is_odd = (int(left) + int(right)) % 2 == 1
        compared = pictures.is_comparable[one] and pictures.is_comparable[other]
        if compared and near <= 6:
            assert (PAIR_KINDS[kind], distance) == ("variant" if is_odd else "near", near)
        elif compared and turned <= 6:
            assert (PAIR_KINDS[kind], distance) == ("turned", turned)
        else:
            assert (PAIR_KINDS[kind], distance) == ("crop", -1)


def test_a_crowd_is_paired_with_its_first_only():
    count = 500
    pictures = Pictures(
        np.arange(1, count + 1, dtype=np.uint64),
        np.full((count, 4), 0x5A5A5A5A5A5A5A5A, np.uint64),
        np.empty((count, 0, 4), np.uint64),
        np.ones(count, dtype=bool),
    )

    pairs = find_pairs(pictures, PairRules(radius=16), np.ones(count, dtype=bool))

    assert len(pairs.left) == count - 1 and (pairs.left == 1).all()
