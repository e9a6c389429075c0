"""Sketches: a place that differs makes a variant, re-encoding does not."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from sharding.images import decode_rgb
from sharding.pictures.sketch import MIN_SIDE, are_variants, is_variant, make_sketch

PICTURES = Path("scripts/demo_pictures")


@pytest.fixture
def picture(paint: Callable[..., Image.Image]) -> Image.Image:
    return paint(3, 480, 360)


def changed(image: Image.Image) -> Image.Image:
    """The picture with another mouth: a mark of 1/16 of its width."""
    result = image.copy()
    x, y, side = image.width // 2, image.height // 2, image.width // 16
    ImageDraw.Draw(result).ellipse((x, y, x + side, y + side // 2), fill=(250, 250, 250))
    ImageDraw.Draw(result).ellipse((x, y + side // 2, x + side, y + side), fill=(10, 10, 10))
    return result


def reencoded(image: Image.Image, image_format: str, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, image_format, quality=quality)
    return decode_rgb(buffer.getvalue())


def brightened(image: Image.Image) -> Image.Image:
    return image.point([min(255, round(level * 1.3)) for level in range(256)] * 3)


def test_a_sketch_has_4000_bytes_and_is_reproducible(picture):
    assert make_sketch(picture) == make_sketch(picture.copy())
    assert len(make_sketch(picture)) == len(make_sketch(Image.new("RGB", (3, 900)))) == 4000


def test_reencoding_resizing_and_brightness_make_no_variant(picture):
    sketch = make_sketch(picture)
    quarter = picture.resize((picture.width // 4, picture.height // 4), Image.Resampling.LANCZOS)
    others = [reencoded(picture, "JPEG", 30), reencoded(picture, "WEBP", 60), quarter, brightened(picture)]

    assert not are_variants([sketch] * len(others), [make_sketch(other) for other in others]).any()


def test_a_changed_place_makes_a_variant_even_after_reencoding(picture):
    sketch, other = make_sketch(picture), changed(picture)

    assert is_variant(sketch, make_sketch(other))
    assert is_variant(make_sketch(other), sketch)
    assert is_variant(sketch, make_sketch(brightened(reencoded(other, "JPEG", 60))))


def test_a_picture_shrunk_to_what_scan_decodes_at_least_has_the_same_sketch(picture):
    small = picture.resize((MIN_SIDE * 4 // 3, MIN_SIDE), Image.Resampling.LANCZOS)

    assert not is_variant(make_sketch(picture), make_sketch(small))


def test_expressions_of_a_face_in_the_demo_are_variants_and_copies_are_not():
    folder = PICTURES / "visual-novel" / "The_Question (ttq)"
    names = ("sylvie_green_normal", "sylvie_green_smile", "sylvie_green_giggle")
    images = [decode_rgb((folder / f"{name}.webp").read_bytes()) for name in names]
    normal, *others = [make_sketch(image) for image in images]

    assert all(is_variant(normal, other) for other in others)
    assert not is_variant(normal, make_sketch(reencoded(images[0], "JPEG", 30)))


def test_black_and_white_pictures_are_compared_without_a_warning():
    black, white = (make_sketch(Image.new("RGB", (300, 300), colour)) for colour in ("black", "white"))

    assert not is_variant(black, black)
    assert not is_variant(white, white)


def test_no_pairs_give_no_answers():
    assert are_variants([], []).tolist() == []


def test_sketches_of_another_version_and_uneven_lists_are_refused(picture):
    sketch = make_sketch(picture)

    with pytest.raises(ValueError, match="0 bytes, expected 4000: it is of another version"):
        is_variant(sketch, b"")
    with pytest.raises(ValueError, match="2 sketches cannot be compared with 1"):
        are_variants([sketch, sketch], [sketch])
