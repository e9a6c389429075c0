import imagehash
import numpy as np
import pytest
from PIL import Image

from sharding.images import decode_rgb
from sharding.pictures.phash import (
    are_degenerate,
    check_hash_size,
    hash_bits,
    hash_picture,
    hash_turned,
    hash_words,
    is_flat,
    perceptual_hash,
)

KINDS = [
    *((algorithm, size) for algorithm in ("phash", "dhash", "average_hash") for size in (4, 8, 11, 16, 32)),
    *(("whash", size) for size in (4, 8, 16, 32)),
    *(("colorhash", size) for size in (2, 3, 8)),
]


@pytest.mark.parametrize(("algorithm", "hash_size"), KINDS)
def test_the_bits_are_those_of_imagehash_and_then_zeros(paint, algorithm, hash_size):
    image = paint(1, 210, 130)

    for stored in (
        perceptual_hash(image, algorithm=algorithm, hash_size=hash_size),
        hash_picture(image, algorithm=algorithm, hash_size=hash_size),  # too small to be averaged down
    ):
        num_bits = hash_bits(algorithm, hash_size)
        bits = np.unpackbits(np.frombuffer(stored, dtype=np.uint8))
        expected = getattr(imagehash, algorithm)(image, hash_size).hash
        assert len(stored) == 8 * hash_words(algorithm, hash_size)
        assert np.array_equal(bits[:num_bits], expected.ravel()) and not bits[num_bits:].any()


def test_words_are_enough_and_not_more():
    assert [hash_words("phash", size) for size in (4, 8, 9, 16, 17, 32)] == [1, 1, 2, 4, 5, 16]
    assert (hash_bits("colorhash", 3), hash_words("colorhash", 3), hash_words("colorhash", 5)) == (42, 1, 2)


@pytest.mark.parametrize(
    ("algorithm", "hash_size", "message"),
    [
        ("phash", 3, "hash_size 3: must be from 4 to 32"),
        ("dhash", 33, "hash_size 33: must be"),
        ("whash", 12, "whash: must be a power of 2"),
        ("colorhash", 16, "it is its binbits, from 2 to 8"),
    ],
)
def test_hashes_that_imagehash_does_not_have_are_refused(algorithm, hash_size, message):
    with pytest.raises(ValueError, match=message):
        check_hash_size(algorithm, hash_size)


TURNS = {
    "mirror": Image.Transpose.FLIP_LEFT_RIGHT,
    "flip": Image.Transpose.FLIP_TOP_BOTTOM,
    "rotate_90": Image.Transpose.ROTATE_90,
    "rotate_180": Image.Transpose.ROTATE_180,
    "rotate_270": Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("algorithm", ["phash", "dhash", "average_hash", "whash"])
def test_a_turned_hash_is_the_hash_of_the_turned_picture(paint, hamming, algorithm):
    image = paint(2, 800, 620)  # averaged down before it is turned

    joined = hash_turned(image, tuple(TURNS), algorithm=algorithm, hash_size=8)

    assert len(joined) == 5 * 8
    for number, transpose in enumerate(TURNS.values()):
        expected = hash_picture(image.transpose(transpose), algorithm=algorithm, hash_size=8)
        assert hamming(joined[8 * number : 8 * number + 8], expected) <= 2
    assert hash_turned(image, (), algorithm=algorithm, hash_size=8) == b""


@pytest.mark.parametrize("seed", range(3))
def test_a_mirrored_copy_is_found_by_its_turned_hash_only(paint, encode, hamming, seed):
    image = paint(seed, 900, 700)
    copy = decode_rgb(encode(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((600, 470)), quality=60))

    stored = hash_picture(copy, algorithm="phash", hash_size=16)

    assert hamming(hash_turned(image, ("mirror",), algorithm="phash", hash_size=16), stored) <= 16
    assert hamming(hash_picture(image, algorithm="phash", hash_size=16), stored) > 48


@pytest.mark.parametrize(("hash_size", "bits"), [(8, 2), (16, 8)])
def test_a_jpeg_decoded_at_a_smaller_scale_has_nearly_the_bits_of_the_full_one(paint, encode, hamming, hash_size, bits):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        pixels = np.asarray(paint(seed, 1500, 1100)).astype(int) + rng.integers(-12, 13, (1100, 1500, 3))
        data = encode(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))

        full = perceptual_hash(decode_rgb(data), algorithm="phash", hash_size=hash_size)
        reduced = hash_picture(decode_rgb(data, min_side=256), algorithm="phash", hash_size=hash_size)

        assert hamming(full, reduced) <= bits


def test_a_resized_and_reencoded_picture_is_near_and_another_is_far(paint, encode, hamming):
    image = paint(3, 900, 700)
    small = decode_rgb(encode(image.resize((450, 350)), quality=40))

    near = hamming(*(hash_picture(i, algorithm="phash", hash_size=16) for i in (image, small)))
    far = hamming(*(hash_picture(i, algorithm="phash", hash_size=16) for i in (image, paint(4, 900, 700))))

    assert near <= 16 < 48 < far


@pytest.mark.parametrize("hash_size", [8, 16])
def test_flat_pictures_are_degenerate(encode, hash_size):
    for colour in ("white", "black", (200, 30, 90)):
        image = decode_rgb(encode(Image.new("RGB", (300, 200), colour), quality=30))

        assert is_flat(image)
        words = np.frombuffer(hash_picture(image, algorithm="phash", hash_size=hash_size), dtype=np.uint64)
        assert are_degenerate(words.reshape(1, -1)).all()


def test_what_no_hash_sees_is_flat_and_one_colour_is_a_colour_for_colorhash():
    image = Image.new("RGB", (2000, 1500), (250, 250, 250))
    image.paste((240, 240, 240), (700, 700, 708, 708))

    assert is_flat(image) and not is_flat(image.crop((650, 650, 760, 760)))
    assert hash_picture(image, algorithm="phash", hash_size=16) == bytes(32)
    assert hash_picture(Image.new("RGB", (90, 90), "red"), algorithm="colorhash", hash_size=3) != bytes(8)


def test_degenerate_means_nearly_all_bits_equal():
    hashes = np.array([[0], [2**64 - 1], [1], [3], [2**32 - 1]], dtype=np.uint64)

    assert are_degenerate(hashes).tolist() == [True, True, True, False, False]
    assert are_degenerate(np.array([[0, 0, 0, 127], [0, 0, 15, 240]], dtype=np.uint64)).tolist() == [True, False]
    ones_of_36 = np.array([[(2**36 - 1) << 28]], dtype=np.uint64)
    assert are_degenerate(ones_of_36, num_bits=36).all() and not are_degenerate(ones_of_36).any()


@pytest.mark.parametrize("size", [(1, 1), (3, 400), (5000, 2)])
@pytest.mark.parametrize("algorithm", ["phash", "dhash", "average_hash", "whash"])
def test_tiny_and_narrow_pictures_have_a_hash_too(paint, algorithm, size):
    assert len(hash_picture(paint(1, *size), algorithm=algorithm, hash_size=16)) == 32
