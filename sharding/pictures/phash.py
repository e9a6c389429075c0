"""Perceptual hashes: bits that stay the same when a picture is resized or re-encoded.

The bits are imagehash's on the same pixels, padded with zero bits to whole 64-bit words. `hash_picture` is the one
path that every picture of a workspace takes: it first averages the pixels down, so that a JPEG decoded at 1/8 scale
and a PNG decoded in full give the same bits but for a few, and marks flat pictures, whose bits would be noise.
Searching hashes is done in `neighbours`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

Algorithm = Literal["phash", "dhash", "average_hash", "whash", "colorhash"]
Turn = Literal["mirror", "flip", "rotate_90", "rotate_180", "rotate_270"]

HASH_VERSION = 3
"""Raised when the same picture would get other bits."""
HASH_SIZES = range(4, 33)
BIN_BITS = range(2, 9)
"""What `hash_size` may be for colorhash, which has no side: its `binbits`, bits for each of 14 colour bins."""

_TRANSPOSES: dict[Turn, Image.Transpose] = {
    "mirror": Image.Transpose.FLIP_LEFT_RIGHT,
    "flip": Image.Transpose.FLIP_TOP_BOTTOM,
    "rotate_90": Image.Transpose.ROTATE_90,  # counter-clockwise
    "rotate_180": Image.Transpose.ROTATE_180,
    "rotate_270": Image.Transpose.ROTATE_270,
}
_FLAT_RANGE = 3  # grey levels; re-encoding noise on a flat picture stays below
_FLAT_SIDE = 64  # pixels; what is smaller than a 64th of the picture no hash sees


def check_hash_size(algorithm: Algorithm, hash_size: int) -> None:
    """Raise ValueError if imagehash has no such hash or if it is too large to be useful."""
    if algorithm == "colorhash":
        if hash_size not in BIN_BITS:
            raise ValueError(
                f"hash_size {hash_size} of colorhash: it is its binbits, from {BIN_BITS[0]} to {BIN_BITS[-1]} "
                "(3 is imagehash's default and gives 42 bits)"
            )
    elif hash_size not in HASH_SIZES:
        raise ValueError(f"hash_size {hash_size}: must be from {HASH_SIZES[0]} to {HASH_SIZES[-1]} (16 is usual)")
    elif algorithm == "whash" and hash_size.bit_count() != 1:
        raise ValueError(f"hash_size {hash_size} of whash: must be a power of 2: 4, 8, 16 or 32")


def hash_bits(algorithm: Algorithm, hash_size: int) -> int:
    """Return how many bits a hash has: hash_size², for colorhash 14 × hash_size."""
    return 14 * hash_size if algorithm == "colorhash" else hash_size * hash_size


def hash_words(algorithm: Algorithm, hash_size: int) -> int:
    """Return how many 64-bit words the stored hash has; its bits stand first, the rest is zero."""
    return -(-hash_bits(algorithm, hash_size) // 64)


def enough_pixels(hash_size: int) -> int:
    """Return the shorter side, in pixels, that a picture needs for a hash of this size.

    imagehash's phash looks at 4 × hash_size pixels a side. With at least 4 times that, the bits differ from those of
    the full picture by less than one re-encoding changes them (2 of 64 and 6 of 256 at the 99th percentile).
    """
    return max(256, 16 * hash_size)


def hash_picture(image: Image.Image, *, algorithm: Algorithm, hash_size: int) -> bytes:
    """Return the hash that the manifest stores: of the averaged-down picture; all zero bits for a flat one.

    colorhash has no flat pictures: one colour is a colour.
    """
    small = _average_down(image, algorithm, hash_size)
    if algorithm != "colorhash" and is_flat(small):
        return bytes(8 * hash_words(algorithm, hash_size))
    return perceptual_hash(small, algorithm=algorithm, hash_size=hash_size)


def hash_turned(image: Image.Image, turns: Sequence[Turn], *, algorithm: Algorithm, hash_size: int) -> bytes:
    """Return the joined hashes, as of `hash_picture`, of the picture turned in each of these ways.

    rotate_90 is counter-clockwise.
    """
    if not turns:
        return b""
    small = _average_down(image, algorithm, hash_size)
    turned = [small.transpose(_TRANSPOSES[turn]) for turn in turns]
    return b"".join(hash_picture(picture, algorithm=algorithm, hash_size=hash_size) for picture in turned)


def perceptual_hash(image: Image.Image, *, algorithm: Algorithm, hash_size: int) -> bytes:
    """Return the bits of `imagehash.<algorithm>(image, hash_size)` row by row, padded to whole 64-bit words.

    image: RGB, or L for all but colorhash. For whash a picture smaller than the hash is enlarged first, which
    imagehash refuses to do.
    """
    import imagehash

    functions: dict[Algorithm, Callable[..., Any]] = {
        "phash": imagehash.phash,
        "dhash": imagehash.dhash,
        "average_hash": imagehash.average_hash,
        "whash": imagehash.whash,
        "colorhash": imagehash.colorhash,
    }
    if algorithm == "whash" and min(image.size) < hash_size:
        image = image.resize((max(image.width, hash_size), max(image.height, hash_size)))
    bits = np.asarray(functions[algorithm](image, hash_size).hash, dtype=bool).ravel()
    return np.packbits(bits).tobytes().ljust(8 * hash_words(algorithm, hash_size), b"\0")


def is_flat(image: Image.Image) -> bool:
    """Tell whether the picture, averaged down to about 64 pixels, has nearly the same grey level everywhere."""
    grey = image.convert("L")
    factor = min(image.size) // _FLAT_SIDE
    lowest, highest = (grey.reduce(factor) if factor > 1 else grey).getextrema()
    assert isinstance(lowest, int | float) and isinstance(highest, int | float)  # one band
    return highest - lowest <= _FLAT_RANGE


def are_degenerate(hashes: npt.NDArray[np.uint64], *, num_bits: int | None = None) -> npt.NDArray[np.bool_]:
    """Tell for each hash whether it says nothing: fewer than 1 in 32 bits differ from all zero or all one.

    hashes: (N, words). num_bits: without the padding (`hash_bits`); by default there is none. Such pictures are flat
    but for a detail, and would all be duplicates of each other.
    """
    num_bits = num_bits or 64 * hashes.shape[1]
    num_ones = np.bitwise_count(hashes).sum(axis=1, dtype=np.int64)
    result: npt.NDArray[np.bool_] = np.minimum(num_ones, num_bits - num_ones) * 32 < num_bits
    return result


def _average_down(image: Image.Image, algorithm: Algorithm, hash_size: int) -> Image.Image:
    if algorithm != "colorhash":
        image = image.convert("L")
    factor = min(image.size) // enough_pixels(hash_size)
    return image.reduce(factor) if factor > 1 else image
