"""Local features: the same places are described alike in a picture and its crop."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from sharding.pictures.local_features import FEATURES, NO_POINT, NUM_POINTS, extract_features, read_features


def test_features_have_one_length_and_are_reproducible(paint: Callable[..., Image.Image]):
    image = paint(1, 640, 400)

    assert extract_features(image) == extract_features(image.copy())
    assert len(extract_features(image)) == FEATURES.itemsize <= 1024


@pytest.mark.parametrize("size", [(640, 400), (400, 640), (256, 256), (64, 48), (900, 110), (1, 1), (2, 3000)])
def test_pictures_of_any_size_have_features(paint: Callable[..., Image.Image], size: tuple[int, int]):
    columns = read_features([extract_features(paint(2, *size))])

    assert columns.level.shape == (1, NUM_POINTS)
    assert columns.size.min() >= 1


def test_a_flat_picture_and_empty_bytes_have_no_points():
    columns = read_features([extract_features(Image.new("RGB", (300, 300), "teal")), b""])

    assert (columns.level == NO_POINT).all()


def test_a_crop_has_many_of_the_features_of_the_picture(paint: Callable[..., Image.Image]):
    image = paint(4, 640, 400)
    buffer = io.BytesIO()
    image.crop((160, 0, 460, 400)).resize((450, 600), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=60)

    columns = read_features([extract_features(image), extract_features(Image.open(buffer).convert("RGB"))])

    whole, part = (row[level != NO_POINT] for row, level in zip(columns.descriptor, columns.level, strict=True))
    nearest = np.bitwise_count(part[:, None] ^ whole[None, :]).min(axis=1)
    assert (nearest <= 6).sum() >= 8


def test_brightness_and_size_leave_descriptors_nearly_as_they_are(paint: Callable[..., Image.Image]):
    image = paint(5, 640, 400)
    darker = image.resize((320, 200), Image.Resampling.LANCZOS).point([level * 2 // 3 for level in range(256)] * 3)

    columns = read_features([extract_features(image), extract_features(darker)])

    nearest = np.bitwise_count(columns.descriptor[0][:, None] ^ columns.descriptor[1][None, :]).min(axis=1)
    assert np.median(nearest) <= 4


def test_features_of_another_version_are_refused():
    with pytest.raises(ValueError, match=r"local features of 3 bytes, expected \d+: they are of another version"):
        read_features([b"", b"abc"])
