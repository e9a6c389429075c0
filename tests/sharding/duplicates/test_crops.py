"""Crops: parts of one picture are pairs, other pictures are not."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sharding.duplicates.crops import find_crops
from sharding.images import decode_rgb
from sharding.pictures.local_features import extract_features

PHOTOS = Path("scripts/demo_pictures/photos")
DISTINCT = (
    "IMG_0041.jpg",
    "IMG_0203.webp",
    "IMG_0310.webp",
    "IMG_0388.webp",
    "IMG_0412.jpg",
    "IMG_0502.webp",
    "IMG_0731.jpg",
)


def jpeg(image: Image.Image, quality: int = 80) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return decode_rgb(buffer.getvalue())


def portrait(image: Image.Image, place: float = 0.4) -> Image.Image:
    """A 9:16 part of a landscape picture, from its left (0) to its right (1)."""
    width = image.height * 9 // 16
    left = round((image.width - width) * place)
    return jpeg(image.crop((left, 0, left + width, image.height)))


def letterbox(image: Image.Image) -> Image.Image:
    result = Image.new("RGB", (image.width, image.height * 4 // 3))
    result.paste(image, (0, image.height // 6))
    return jpeg(result)


def pairs_of(images: list[Image.Image]) -> list[tuple[int, int]]:
    found = find_crops([extract_features(image) for image in images])
    return list(zip(found.left.tolist(), found.right.tolist(), strict=True))


@pytest.fixture
def pictures(paint: Callable[..., Image.Image]) -> list[Image.Image]:
    return [paint(seed, 640, 400) for seed in range(6)]


def test_a_portrait_a_square_and_a_letterboxed_version_belong_to_their_picture(pictures):
    first = pictures[0]
    square = first.crop((120, 0, 520, 400)).resize((250, 250), Image.Resampling.LANCZOS)

    found = pairs_of([*pictures, portrait(first), square, letterbox(first)])

    assert {(0, 6), (0, 7), (0, 8)} <= set(found)
    assert {index for pair in found for index in pair} == {0, 6, 7, 8}


def test_different_pictures_are_no_pairs(pictures):
    assert pairs_of(pictures) == []


def test_the_same_text_box_does_not_join_different_pictures(pictures):
    for image in pictures:
        draw = ImageDraw.Draw(image)
        draw.rectangle((0, 300, 640, 400), fill=(20, 20, 40))
        draw.text((30, 320), "And then she said that\nit would all be over soon", fill="white", font_size=26)

    assert pairs_of(pictures) == []


def test_a_logo_that_all_have_does_not_join_different_pictures(pictures):
    logo = Image.new("RGB", (120, 120), "white")
    ImageDraw.Draw(logo).polygon([(10, 110), (60, 10), (110, 110), (60, 70)], fill="red", outline="black")
    for image in pictures:
        image.paste(logo, (500, 20))

    assert pairs_of(pictures) == []


def test_a_small_part_is_not_a_crop(pictures):
    """A detail of a tenth of the picture is a picture of its own."""
    detail = pictures[0].crop((200, 100, 400, 225)).resize((640, 400), Image.Resampling.BICUBIC)

    assert pairs_of([*pictures, detail]) == []


def test_portraits_of_the_demos_photos_are_found_and_nothing_else_is():
    paths = [path for path in sorted(PHOTOS.iterdir()) if path.name in DISTINCT]
    images = [decode_rgb(path.read_bytes(), min_side=256) for path in paths]
    parts = [portrait(image, place) for place, image in zip(np.linspace(0, 1, len(images)), images, strict=True)]

    found = set(pairs_of(images + parts))

    own = {(index, index + len(images)) for index in range(len(images))}
    assert len(found & own) >= 0.85 * len(own)
    assert found <= own


def test_pairs_come_sorted_with_scores_and_shares(pictures):
    found = find_crops([extract_features(image) for image in (pictures[1], portrait(pictures[1]), jpeg(pictures[1]))])

    assert list(zip(found.left.tolist(), found.right.tolist(), strict=True)) == [(0, 1), (0, 2), (1, 2)]
    assert ((found.score > 0.5) & (found.score <= 1)).all()
    assert found.share == pytest.approx([0.35, 1.0, 0.35], abs=0.04)


def test_pictures_without_features_are_in_no_pair(pictures):
    flat = extract_features(Image.new("RGB", (300, 300), "teal"))

    assert len(find_crops([]).left) == 0
    assert len(find_crops([b"", flat, flat, b""]).left) == 0


def test_a_feature_that_very_many_pictures_have_proposes_nothing(pictures):
    copies = [extract_features(pictures[0])] * 40

    assert len(find_crops(copies).left) == 0
    assert len(find_crops(copies[:5]).left) == 10


def test_threads_and_order_do_not_change_the_pairs(pictures):
    features = [extract_features(image) for image in (*pictures, portrait(pictures[2]), portrait(pictures[4]))]
    order = [5, 7, 2, 0, 6, 4, 1, 3]

    straight = find_crops(features)
    shuffled = find_crops([features[place] for place in order])

    expected = {frozenset(pair) for pair in zip(straight.left.tolist(), straight.right.tolist(), strict=True)}
    renamed = zip(shuffled.left.tolist(), shuffled.right.tolist(), strict=True)
    assert {frozenset((order[left], order[right])) for left, right in renamed} == expected
    assert expected
