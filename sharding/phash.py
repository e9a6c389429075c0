"""Perceptual hashes: bits that stay the same when a picture is resized or re-encoded.

The bits are imagehash's on the same pixels. `hash_picture` is the one path that every picture of a workspace takes:
it first averages the pixels down, so that a JPEG decoded at 1/4 scale and a PNG decoded in full give the same bits
but for a few, and marks flat pictures, whose bits would be noise.
"""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

Algorithm = Literal["phash", "dhash", "average_hash", "whash"]

_FLAT_RANGE = 3  # grey levels; re-encoding noise on a flat picture stays below


def enough_pixels(hash_size: int) -> int:
    """Return the shorter side, in pixels, that a picture needs for a hash of this size.

    imagehash's phash looks at 4 × hash_size pixels a side; 8 times that for 64 bits and 4 times for 256 keep the
    bits within 2 and 8 of those of the full picture.
    """
    return 256 if hash_size <= 8 else 16 * hash_size


def hash_picture(image: Image.Image, *, algorithm: Algorithm, hash_size: int) -> bytes:
    """Return the hash that the manifest stores: of the averaged-down picture; all zero bits for a flat one."""
    factor = min(image.size) // enough_pixels(hash_size)
    small = image.reduce(factor) if factor > 1 else image
    if is_flat(small):
        return bytes(hash_size * hash_size // 8)
    return perceptual_hash(small, algorithm=algorithm, hash_size=hash_size)


def perceptual_hash(image: Image.Image, *, algorithm: Algorithm, hash_size: int) -> bytes:
    """Return `imagehash.<algorithm>(image, hash_size=hash_size)`, its rows packed big-endian: hash_size² / 8 bytes.

    image: RGB. For whash a picture smaller than the hash is enlarged first, which imagehash refuses to do.
    """
    import imagehash

    functions: dict[str, Callable[..., Any]] = {
        "phash": imagehash.phash,
        "dhash": imagehash.dhash,
        "average_hash": imagehash.average_hash,
        "whash": imagehash.whash,
    }
    if algorithm == "whash" and min(image.size) < hash_size:
        image = image.resize((max(image.width, hash_size), max(image.height, hash_size)))
    bits = functions[algorithm](image, hash_size=hash_size).hash
    return np.packbits(np.asarray(bits, dtype=bool).ravel()).tobytes()


def is_flat(image: Image.Image) -> bool:
    """Tell whether all pixels have nearly the same grey level."""
    lowest, highest = image.convert("L").getextrema()
    assert isinstance(lowest, int | float) and isinstance(highest, int | float)  # one band
    return highest - lowest <= _FLAT_RANGE


def are_degenerate(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Tell for each hash whether it says nothing: fewer than 1 in 32 bits differ from all zero or all one.

    hashes: (N, words). Such pictures are flat but for a detail, and would all be duplicates of each other.
    """
    num_bits = 64 * hashes.shape[1]
    num_ones = np.bitwise_count(hashes).sum(axis=1, dtype=np.int64)
    result: npt.NDArray[np.bool_] = np.minimum(num_ones, num_bits - num_ones) * 32 < num_bits
    return result
