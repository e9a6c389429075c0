"""Search sets of hashes for all near pairs: time and memory, against brute force and, where installed, faiss, usearch.

Two sets: random bits, and bits in clusters as real pictures have them (many pictures near to each other). Sizes of
hash: 64 bits at radius 6, as the bar has it, and 256 bits at radius 16, the default. The pairs of some hashes are
compared with brute force over the whole set. Peers run on the smaller set only; none of them is needed.
"""

import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import numpy.typing as npt

from scripts.bench.result import Bar, Result, peak_gigabytes
from sharding.duplicates.neighbours import NearPairs, near_pairs

Hashes = npt.NDArray[np.uint64]
_SIZE = 200_000
_FULL_SIZES = (1_000_000, 5_600_000)
_PEER_SIZE, _FULL_PEER_SIZE = 50_000, 1_000_000
_SAMPLE = 50
_BITS_AND_RADIUS = ((64, 6), (256, 16))
_USEARCH_NEIGHBOURS = 10


def run(*, full: bool, data: Path | None) -> Result:
    """Measure both sizes of hash on both sets. `data` is not used: hashes are made up."""
    figures: dict[str, float] = {}
    near_pairs(_random(1_000, 64), 1)  # compiled before the clock runs
    differences = 0
    for size in _FULL_SIZES if full else (_SIZE,):
        for bits, radius in _BITS_AND_RADIUS:
            for name, make in (("random", _random), ("clustered", _clustered)):
                hashes = make(size, bits)
                started = time.monotonic()
                pairs = near_pairs(hashes, radius)
                label = f"{name}_{bits}_bits_{_short(size)}"
                figures[f"{label}_seconds"] = time.monotonic() - started
                figures[f"{label}_pairs"] = len(pairs.left)
                differences += _differences(hashes, pairs, radius)
                del pairs
    figures["pairs_unlike_brute_force"] = differences
    figures["peak_gigabytes"] = peak_gigabytes()
    notes = _peers(figures, _FULL_PEER_SIZE if full else _PEER_SIZE)
    return Result(
        bench="neighbours",
        figures=figures,
        bars=[
            Bar("pairs_unlike_brute_force", at_most=0),
            Bar("peak_gigabytes", at_most=4),
            *(
                Bar(f"{name}_64_bits_{_short(size)}_seconds", at_most=seconds)
                for size, seconds in zip(_FULL_SIZES, (30, 600), strict=True)
                for name in ("random", "clustered")
                if full
            ),
        ],
        full_size=full,
        peer="brute force",
        notes=notes,
    )


def _short(size: int) -> str:
    return f"{size / 1e6:g}M".replace(".", "_")


def _random(size: int, bits: int) -> Hashes:
    return np.random.default_rng(0).integers(0, 2**64, (size, bits // 64), dtype=np.uint64)


def _clustered(size: int, bits: int) -> Hashes:
    """A third of the hashes are around others: each is a copy of one of 1 in 9 with up to 1 bit in 10 flipped."""
    random = np.random.default_rng(1)
    hashes = _random(size, bits)
    members, centres = random.integers(0, size, size // 3), random.integers(0, size // 9, size // 3)
    hashes[members] = hashes[centres]
    num_flips = random.integers(0, bits // 10, len(members))
    for flip in range(bits // 10):
        bit = random.integers(0, bits, len(members))
        flipped = np.uint64(1) << (bit % 64).astype(np.uint64)
        rows = flip < num_flips
        hashes[members[rows], bit[rows] // 64] ^= flipped[rows]
    return hashes


def _differences(hashes: Hashes, pairs: NearPairs, radius: int) -> int:
    """Return how many pairs of a sample of hashes are missing, too many or of a wrong distance."""
    rows = np.random.default_rng(2).choice(len(hashes), _SAMPLE, replace=False)
    rows[: _SAMPLE // 2] = pairs.left[:: max(1, len(pairs.left) // _SAMPLE)][: _SAMPLE // 2] if len(pairs.left) else 0
    count = 0
    for row in np.unique(rows):
        bits = np.bitwise_count(hashes ^ hashes[row]).sum(axis=1, dtype=np.int64)
        near = np.flatnonzero(bits <= radius)
        expected = {(int(other), int(bits[other])) for other in near if other != row}
        found = set()
        for end, other in ((pairs.left, pairs.right), (pairs.right, pairs.left)):
            chosen = end == row
            found |= set(zip(other[chosen].tolist(), pairs.distance[chosen].tolist(), strict=True))
        count += len(found ^ expected)
    return count


# --- peers ---


def _peers(figures: dict[str, float], size: int) -> list[str]:
    """Measure the peers that are installed on 64-bit clustered hashes; return notes."""
    hashes = _clustered(size, 64)
    bits, radius = _BITS_AND_RADIUS[0]
    started = time.monotonic()
    ours = near_pairs(hashes, radius)
    figures[f"ours_{_short(size)}_seconds"] = time.monotonic() - started
    notes = []
    peers: tuple[tuple[str, str, Callable[[Hashes, int], int]], ...] = (
        ("faiss-cpu", "faiss", _faiss_pairs),
        ("usearch", "usearch", _usearch_pairs),
    )
    for package, name, search in peers:
        try:
            release = version(package)
        except PackageNotFoundError:
            notes.append(f"{package} is not installed here; nothing was measured against it")
            continue
        started = time.monotonic()
        found = search(hashes, radius)
        figures[f"{name}_{_short(size)}_seconds"] = time.monotonic() - started
        figures[f"{name}_recall"] = found / max(1, len(ours.left))
        notes.append(f"{package} {release}, {bits} bits, radius {radius}, {size:,} hashes")
    return notes


def _faiss_pairs(hashes: Hashes, radius: int) -> int:
    """Return the number of pairs that faiss's exhaustive binary index finds; its range is exclusive."""
    import faiss  # type: ignore[import-not-found]

    octets = hashes.view(np.uint8).reshape(len(hashes), -1)
    index = faiss.IndexBinaryFlat(octets.shape[1] * 8)
    index.add(octets)
    limits, _, _ = index.range_search(octets, radius + 1)
    return (int(limits[-1]) - len(hashes)) // 2


def _usearch_pairs(hashes: Hashes, radius: int) -> int:
    """Return the number of pairs that usearch's HNSW graph finds among the 10 nearest of each."""
    from usearch.index import Index, MetricKind, ScalarKind  # type: ignore[import-not-found]

    octets = hashes.view(np.uint8).reshape(len(hashes), -1)
    index = Index(ndim=octets.shape[1] * 8, metric=MetricKind.Hamming, dtype=ScalarKind.B1)
    index.add(np.arange(len(octets)), octets)
    matches = index.search(octets, _USEARCH_NEIGHBOURS)
    rows = np.repeat(np.arange(len(octets)), matches.keys.shape[1])
    keys, bits = matches.keys.ravel().astype(np.int64), matches.distances.ravel()
    near = (bits <= radius) & (keys != rows)
    low, high = np.minimum(rows, keys)[near], np.maximum(rows, keys)[near]
    return len(np.unique(low * len(octets) + high))
