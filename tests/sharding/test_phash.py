import imagehash
import numpy as np
import pytest
from PIL import Image

from sharding.images import decode_rgb
from sharding.phash import are_degenerate, hash_picture, is_flat, perceptual_hash


@pytest.mark.parametrize("algorithm", ["phash", "dhash", "average_hash", "whash"])
@pytest.mark.parametrize("hash_size", [8, 16])
def test_the_bits_are_those_of_imagehash(paint, algorithm, hash_size):
    image = paint(1, 210, 130)

    packed = perceptual_hash(image, algorithm=algorithm, hash_size=hash_size)

    expected = getattr(imagehash, algorithm)(image, hash_size=hash_size)
    assert packed.hex() == str(expected)
    assert len(packed) == hash_size**2 // 8


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


def test_degenerate_means_nearly_all_bits_equal():
    hashes = np.array([[0], [2**64 - 1], [1], [3], [2**32 - 1]], dtype=np.uint64)

    assert are_degenerate(hashes).tolist() == [True, True, True, False, False]
    assert are_degenerate(np.array([[0, 0, 0, 127], [0, 0, 15, 240]], dtype=np.uint64)).tolist() == [True, False]


@pytest.mark.parametrize("size", [(1, 1), (3, 400), (5000, 2)])
@pytest.mark.parametrize("algorithm", ["phash", "dhash", "average_hash", "whash"])
def test_tiny_and_narrow_pictures_have_a_hash_too(paint, algorithm, size):
    assert len(hash_picture(paint(1, *size), algorithm=algorithm, hash_size=16)) == 32
