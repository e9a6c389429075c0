from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sharding.images import ImageError, decode_rgb
from tests.training.chunks import SMALL, paint
from tests.training.chunks import encode as encode_as
from training.buckets import BucketSettings, placement
from training.loading.colour import ColourJitter
from training.loading.pixels import RESAMPLING, PixelSettings, crop_position, resized_image, show
from training.randomness import SampleIdentity

DEMO_PICTURES = Path(__file__).parents[3] / "scripts" / "demo_pictures"


def who(number=0):
    return SampleIdentity(seed=1, epoch=0, chunk="c", key=f"{number:04d}")


def encode(picture, image_format="PNG"):
    return encode_as(picture, image_format)


def shown(picture, mask=None, number=0, settings=SMALL, **values):
    placed = placement(*picture.size, settings=settings)
    mask_bytes = encode(mask) if mask is not None else b""
    return show(
        encode(picture), mask_bytes, size=picture.size, placement=placed, settings=PixelSettings(**values),
        identity=who(number),
    )  # fmt: skip


# --- against Pillow's full decode ---


def test_dct_scaling_covers_the_resized_size_and_stays_close_to_a_full_decode():
    picture = paint(1, 1600, 1201)
    placed = placement(1600, 1201, settings=BucketSettings(resolution_area=320 * 320, step=32))

    scaled = np.asarray(resized_image(encode(picture, "JPEG"), 1600, 1201, placement=placed)).astype(float)
    full = np.asarray(resized_image(encode(picture), 1600, 1201, placement=placed)).astype(float)

    assert scaled.shape == (placed.resized_height, placed.resized_width, 3)
    assert np.abs(scaled - full).mean() < 2


@pytest.mark.parametrize("factor", [1.3, 2.3, 5.0])
def test_real_pictures_differ_little_from_a_full_decode_and_resize(factor):
    """By at most 2 of 255 levels on average, 5 in the worst picture: as much as another filter of Pillow's makes."""
    means = []
    for path in sorted((DEMO_PICTURES / "visual-novel").rglob("*.jpg"))[:3] + sorted(DEMO_PICTURES.rglob("*.jpg"))[:6]:
        data = path.read_bytes()
        size = Image.open(path).size
        if min(size) < 300:
            continue
        full = decode_rgb(data)
        area = round(full.width / factor) * round(full.height / factor)
        placed = placement(*full.size, settings=BucketSettings(resolution_area=area, step=32))

        ours = np.asarray(resized_image(data, *full.size, placement=placed)).astype(float)

        expected = np.asarray(full.resize((placed.resized_width, placed.resized_height), RESAMPLING)).astype(float)
        means.append(np.abs(ours - expected).mean())
        assert means[-1] <= 5, path
    assert len(means) >= 4
    assert np.mean(means) <= 2


def test_a_picture_of_another_size_is_a_mismatch():
    placed = placement(300, 200, settings=SMALL)

    with pytest.raises(ImageError, match="size_mismatch"):
        resized_image(encode(paint(0, 310, 200), "JPEG"), 300, 200, placement=placed)


# --- masks ---


@pytest.mark.parametrize("crop", ["centre", "random", "focus"])
@pytest.mark.parametrize("flip_fraction", [0.0, 1.0])
@pytest.mark.parametrize("size", [(240, 200), (130, 80), (96, 96)])
def test_a_mask_goes_where_its_picture_goes(crop, flip_fraction, size):
    mask = paint(3, *size).convert("L")

    result = shown(mask.convert("RGB"), mask, crop=crop, flip_fraction=flip_fraction)

    assert np.array_equal(result.mask, result.image[..., 0])
    assert result.mask.std() > 1


def test_colours_move_and_masks_do_not():
    mask = paint(3, 130, 80).convert("L")

    plain = shown(paint(1, 130, 80), mask)
    moved = shown(paint(1, 130, 80), mask, colour_jitter=ColourJitter(brightness=0.5))

    assert np.array_equal(plain.mask, moved.mask)
    assert not np.array_equal(plain.image, moved.image)


def test_masks_can_be_ignored():
    mask = paint(3, 130, 80).convert("L")

    assert shown(paint(1, 130, 80), mask, with_masks=False).mask is None
    assert shown(paint(1, 130, 80)).mask is None
    assert not PixelSettings(with_masks=False).needs_masks
    assert PixelSettings(with_masks=False, crop="focus").needs_masks


@pytest.mark.parametrize("mask", [b"no png", encode(Image.new("L", (96, 95)))], ids=["unreadable", "another size"])
def test_a_bad_mask_is_told(mask):
    placed = placement(96, 96, settings=SMALL)

    with pytest.raises(ImageError, match="bad_mask: the mask"):
        show(encode(paint(0, 96, 96)), mask, size=(96, 96), placement=placed, settings=PixelSettings(), identity=who())


# --- crops ---


def test_focus_puts_the_masks_centre_of_gravity_into_the_middle_as_near_as_can_be():
    placed = placement(230, 110, settings=SMALL)  # resized to 139 x 66 or so, cropped to its bucket
    spare = placed.resized_width - placed.bucket.width, placed.resized_height - placed.bucket.height
    assert spare[0] > 4
    for start in range(placed.resized_width - 3):
        mask = np.zeros((placed.resized_height, placed.resized_width), np.uint8)
        mask[:, start : start + 4] = 200

        left, top = crop_position(placed, crop="focus", identity=who(), mask=mask)

        distances = [abs(at + placed.bucket.width / 2 - (start + 2)) for at in range(spare[0] + 1)]
        assert distances[left] == min(distances)
        assert top == spare[1] // 2


@pytest.mark.parametrize("fill", [None, 0, 255])
def test_focus_without_anything_to_see_is_the_centre(fill):
    placed = placement(233, 111, settings=SMALL)
    shape = (placed.resized_height, placed.resized_width)
    mask = None if fill is None else np.full(shape, fill, np.uint8)

    focus = crop_position(placed, crop="focus", identity=who(), mask=mask)

    assert focus == crop_position(placed, crop="centre", identity=who())


def test_random_crops_reach_both_ends_and_belong_to_the_showing():
    placed = placement(230, 110, settings=SMALL)
    lefts = [crop_position(placed, crop="random", identity=who(number))[0] for number in range(300)]

    assert {min(lefts), max(lefts)} == {0, placed.resized_width - placed.bucket.width}
    assert lefts[7] == crop_position(placed, crop="random", identity=who(7))[0]


def test_pixel_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="crop: must be"):
        PixelSettings(crop="smart")
    with pytest.raises(ValueError, match="flip_fraction"):
        PixelSettings(flip_fraction=2)
