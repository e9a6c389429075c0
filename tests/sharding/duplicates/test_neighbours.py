import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.duplicates.neighbours import NearPairs, _band_bounds, near_pairs, near_pairs_between, unique_hashes


def planted(seed, num_hashes, words):
    """Random hashes, a third of them copies of others with 0 to 12 bits flipped."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, (num_hashes, words), dtype=np.uint64)
    for _ in range(num_hashes // 3):
        i, j = rng.integers(0, num_hashes, 2)
        hashes[j] = hashes[i]
        for bit in rng.integers(0, 64 * words, rng.integers(0, 13)):
            hashes[j, bit // 64] ^= np.uint64(1 << int(bit % 64))
    return hashes


def brute_force(left, right, radius):
    bits = np.bitwise_count(left[:, None, :] ^ right[None, :, :]).sum(axis=2)
    rows, columns = np.nonzero(bits <= radius)
    return rows, columns, bits[rows, columns]


def as_set(pairs: NearPairs):
    return list(zip(pairs.left.tolist(), pairs.right.tolist(), pairs.distance.tolist(), strict=True))


@pytest.mark.parametrize("words", [1, 4])
@pytest.mark.parametrize("radius", range(11))
def test_the_pairs_are_those_of_brute_force(words, radius):
    hashes = planted(radius, 400, words)

    found = near_pairs(hashes, radius)

    rows, columns, bits = brute_force(hashes, hashes, radius)
    is_pair = rows < columns
    assert as_set(found) == list(
        zip(rows[is_pair].tolist(), columns[is_pair].tolist(), bits[is_pair].tolist(), strict=True)
    )


@settings(max_examples=30, deadline=None)
@given(
    small=st.lists(st.lists(st.integers(0, 200), min_size=1, max_size=1), max_size=40),
    radius=st.integers(0, 9),
)
def test_any_hashes_and_any_radius_agree_with_brute_force(small, radius):
    hashes = np.array(small, dtype=np.uint64).reshape(-1, 1)

    found = near_pairs(hashes, radius)

    rows, columns, bits = brute_force(hashes, hashes, radius)
    is_pair = rows < columns
    assert as_set(found) == list(
        zip(rows[is_pair].tolist(), columns[is_pair].tolist(), bits[is_pair].tolist(), strict=True)
    )


def test_the_order_of_the_rows_does_not_matter():
    hashes = planted(7, 300, 4)
    order = np.random.default_rng(1).permutation(len(hashes))

    shuffled = near_pairs(hashes[order], 8)

    renamed = sorted(
        (*sorted((int(order[i]), int(order[j]))), d)
        for i, j, d in zip(shuffled.left, shuffled.right, shuffled.distance.tolist(), strict=True)
    )
    assert renamed == [tuple(pair) for pair in as_set(near_pairs(hashes, 8))]


@pytest.mark.parametrize("words", [1, 4])
def test_an_increment_finds_the_pairs_with_the_old(words):
    hashes = planted(3, 300, words)
    new, old = hashes[:60], hashes[60:]

    found = near_pairs_between(new, old, 6)

    rows, columns, bits = brute_force(new, old, 6)
    assert as_set(found) == list(zip(rows.tolist(), columns.tolist(), bits.tolist(), strict=True))


def test_more_pairs_than_the_first_buffer_holds_are_all_found():
    hashes = np.arange(512, dtype=np.uint64).reshape(-1, 1)

    found = near_pairs(hashes, 9)

    assert len(found.left) == 512 * 511 // 2


def test_unique_hashes_point_back():
    hashes = planted(5, 200, 4)

    distinct, inverse = unique_hashes(hashes)

    assert len(np.unique(distinct, axis=0)) == len(distinct)
    assert np.array_equal(distinct[inverse], hashes)


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="uint64"):
        near_pairs(np.zeros((3, 1)), 1)
    with pytest.raises(ValueError, match="words"):
        near_pairs_between(np.zeros((1, 1), np.uint64), np.zeros((1, 4), np.uint64), 1)
    with pytest.raises(ValueError, match="radius"):
        near_pairs(np.zeros((3, 1), np.uint64), -1)


@pytest.mark.parametrize("num_bits", [1, 16, 42, 100])
def test_padded_hashes_are_searched_by_the_bits_they_have(num_bits):
    hashes = planted(num_bits, 300, 2)
    hashes[:, 0] &= np.uint64((1 << min(num_bits, 64)) - 1)
    hashes[:, 1] &= np.uint64((1 << max(num_bits - 64, 0)) - 1)

    found = near_pairs(hashes, 4)

    rows, columns, bits = brute_force(hashes, hashes, 4)
    is_pair = rows < columns
    assert as_set(found) == list(
        zip(rows[is_pair].tolist(), columns[is_pair].tolist(), bits[is_pair].tolist(), strict=True)
    )


@pytest.mark.parametrize("radius", range(40))
def test_the_bounds_of_the_bands_leave_no_pair_out(radius):
    for num_bands in (1, 3, 4, 16):
        bounds = _band_bounds(radius, num_bands)

        # The most bits that a pair can differ in while it is beyond the bound of every band.
        least_beyond = int((bounds + 1).sum())
        assert least_beyond > radius or (bounds == 16).all()
