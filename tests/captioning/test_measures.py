"""Plain measures: numbers worked out by hand, and files of known quality."""

import io

import numpy as np
import pytest
from PIL import Image

from captioning import measures
from captioning.annotate import annotate
from sharding.config import ConfigError


def grey(rows):
    return Image.fromarray(np.array(rows, dtype=np.uint8)).convert("RGB")


def jpeg(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def test_brightness_and_contrast_of_black_white_and_half():
    black, white = grey([[0] * 4] * 4), grey([[255] * 4] * 4)
    half = grey([[0, 0, 255, 255]] * 4)

    assert [measures.brightness(it) for it in (black, half, white)] == [0, 0.5, 1]
    assert [measures.contrast(it) for it in (black, half, white)] == [0, 1, 0]


def test_brightness_weighs_the_colours_as_bt_601():
    assert measures.brightness(Image.new("RGB", (8, 8), (0, 255, 0))) == pytest.approx(0.587, abs=0.003)


def test_sharpness_is_the_variance_of_the_laplacian():
    # Inside: 4 * 100 = 400 in the middle, its four neighbours -100 each, the corners 0. Mean 0 over 9.
    image = grey([[0] * 5, [0] * 5, [0, 0, 100, 0, 0], [0] * 5, [0] * 5])

    assert measures.sharpness(image) == pytest.approx((400**2 + 4 * 100**2) / 9)
    assert measures.sharpness(grey([[1, 2], [3, 4]])) == 0


def test_a_softer_picture_is_less_sharp(picture):
    sharp = picture(200, 100)
    soft = sharp.resize((50, 25), Image.BICUBIC).resize((200, 100), Image.BICUBIC)

    assert measures.sharpness(soft) < measures.sharpness(sharp) / 4


@pytest.mark.parametrize(
    ("top", "bottom", "left", "right"), [(0, 0, 0, 0), (10, 14, 0, 0), (3, 5, 7, 0), (0, 0, 20, 20)]
)
def test_borders_are_the_share_of_the_frame(picture, top, bottom, left, right):
    inner = np.clip(np.asarray(picture(60, 40)), 30, 255)
    noise = np.random.default_rng(0).integers(0, 4, (40 + top + bottom, 60 + left + right, 3), dtype=np.uint8)
    noise[top : top + 40, left : left + 60] = inner

    found = measures.borders(Image.fromarray(noise))

    assert found == pytest.approx(1 - 60 * 40 / (noise.shape[0] * noise.shape[1]))


def test_a_picture_of_one_colour_is_all_border():
    assert measures.borders(Image.new("RGB", (1, 1))) == 1
    assert measures.borders(Image.new("RGB", (50, 20), (9, 200, 7))) == 1
    assert measures.borders(grey([[0] * 30] * 5 + [[255] * 30] * 6)) == 1
    assert measures.borders(grey([[0] * 5 + [255] * 6] * 30)) == 1


def test_blockiness_by_hand():
    # Steps of 2 inside blocks and of 6 at their borders, along rows; none along columns, which has as many places.
    steps = [6 if place % 8 == 0 else 2 for place in range(1, 24)]
    image = grey([np.concatenate([[0], np.cumsum(steps)])] * 24)

    assert measures.blockiness(image) == pytest.approx(6 / 2 - 1)
    assert measures.blockiness(grey([[5] * 24] * 24)) == 0
    assert measures.blockiness(grey([[5, 9] * 4] * 8)) == 0


def test_strong_compression_shows_blocks(lab):
    smooth = Image.open(io.BytesIO(lab.png(320, 240, seed=3)))
    levels = [measures.blockiness(Image.open(io.BytesIO(jpeg(smooth, quality=quality)))) for quality in (95, 30, 5)]

    assert levels[0] < 0.2 and levels[0] < levels[1] < levels[2] and levels[2] > 1


def test_jpeg_quality_is_exact_for_every_quality_of_libjpeg(picture):
    image = picture(16, 16)

    assert [measures.jpeg_quality(jpeg(image, quality=quality)) for quality in range(1, 101)] == list(range(1, 101))
    assert measures.jpeg_quality(jpeg(image.convert("L"), quality=42)) == 42
    assert measures.jpeg_quality(jpeg(image, quality=77, progressive=True, subsampling=2)) == 77


def test_jpeg_quality_of_other_tables_is_near(picture):
    tables = [[max(value * 5 // 4, 1) for value in table] for table in ([16] * 64, [17] * 64)]

    assert 30 < measures.jpeg_quality(jpeg(picture(16, 16), qtables=tables)) < 90


def test_files_of_other_formats_have_no_jpeg_quality(lab):
    assert measures.jpeg_quality(lab.png(8, 8)) is None


def test_all_measures_annotate_in_one_decode_and_a_png_is_not_broken(lab):
    names = ("brightness", "contrast", "sharpness", "borders", "blockiness", "jpeg_quality")
    models = {name.replace("_", "-"): {"kind": "measure", "measure": name} for name in names}
    photo = jpeg(Image.open(io.BytesIO(lab.png(64, 48, seed=1))), quality=88)
    records = lab.save(photo, *(lab.png(40 + n, 40) for n in range(24)))
    lab.keep(records)

    report = annotate(lab.annotate_config(models, max_broken_fraction=0.0), lab.workspace)

    assert report.num_decodes == 25 and report.without_result == {"not_applicable": 24}
    quality = list(lab.rows("jpeg-quality").values())
    assert (quality[0]["score"], quality[0]["status"]) == (88.0, "ok")
    assert {(row["score"], row["status"]) for row in quality[1:]} == {(None, "not_applicable")}
    assert all(row["status"] == "ok" for row in lab.rows("sharpness").values())


def test_measures_of_pixels_refuse_scaled_decoding(lab):
    lab.keep(lab.save(lab.png(64, 64)))
    tables = {"models": {"soft": {"kind": "measure", "measure": "sharpness"}}, "workers": 0, "min_side": 256}

    with pytest.raises(ConfigError, match=r"min_side: 'soft' measures the file's own pixels; leave min_side out"):
        annotate(lab.config(annotate=tables), lab.workspace)
