import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import numpy as np
import pytest
from PIL import Image, ImageCms

from sharding.images import FORMATS, ImageError, decode_grey, decode_rgb, encode_jpeg, encode_png, is_too_broken, probe
from sharding.pictures.jxl_header import jxl_size

PILLOW_NAMES = {name: name.upper() for name in FORMATS}


def mean_difference(left, right):
    return np.abs(np.asarray(left.convert("RGB"), dtype=int) - np.asarray(right.convert("RGB"), dtype=int)).mean()


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_probed_and_decoded(paint, encode, name):
    image = paint(1)
    data = encode(image, PILLOW_NAMES[name])

    facts = probe(data)
    decoded = decode_rgb(data)

    assert (facts.format, facts.width, facts.height) == (name, 96, 72)
    assert (decoded.mode, decoded.size) == ("RGB", (96, 72))
    assert mean_difference(decoded, image) < (20 if name == "gif" else 8)
    assert facts.is_lossless == (name in ("png", "gif", "bmp", "tiff"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_to_size_and_pixels(paint, encode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = paint(2)
    upright_size = (72, 96) if orientation >= 5 else (96, 72)

    data = encode(image, exif=exif)

    facts = probe(data)
    assert (facts.width, facts.height) == decode_rgb(data).size == upright_size
    assert facts.is_pass_through == (orientation == 1)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_alpha_is_laid_on_white(encode, mode):
    image = Image.new("RGBA", (20, 10), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 10, 10))

    data = encode(image.quantize() if mode == "P" else image.convert(mode), "PNG")

    facts = probe(data)
    assert facts.mode == mode and facts.has_alpha and not facts.is_pass_through
    assert decode_rgb(data).getpixel((15, 5)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("mode", "image_format"), [("L", "PNG"), ("1", "PNG"), ("CMYK", "JPEG"), ("YCbCr", "JPEG"), ("LAB", "TIFF")]
)
def test_other_modes_become_rgb(paint, encode, mode, image_format):
    image = paint(3).convert(mode) if mode != "LAB" else None
    if image is None:
        profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
        image = ImageCms.profileToProfile(paint(3), *profiles, outputMode="LAB")

    assert decode_rgb(encode(image, image_format)).mode == "RGB"


def test_sixteen_bit_grey_is_scaled_not_clipped(encode):
    samples = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)

    decoded = np.asarray(decode_rgb(encode(Image.fromarray(samples), "PNG")))[..., 0].ravel()

    assert np.array_equal(decoded, np.arange(256))


def test_an_srgb_profile_passes_through_and_a_broken_one_is_ignored(encode):
    image = Image.new("RGB", (8, 8), (200, 40, 40))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()

    for profile in (srgb, b"no profile at all"):
        data = encode(image, "PNG", icc_profile=profile)

        assert probe(data).is_pass_through
        assert decode_rgb(data).getpixel((0, 0)) == (200, 40, 40)


def test_exif_dates_are_read_and_nonsense_is_none(paint, encode):
    for text, date in (
        ("2011:02:03 04:05:06", datetime(2011, 2, 3, 4, 5, 6, tzinfo=UTC)),
        ("0000:00:00 00:00:00", None),
    ):
        exif = Image.Exif()
        exif[0x0132] = text

        assert probe(encode(paint(1), exif=exif)).exif_date == date


@pytest.mark.parametrize("min_side", [None, 100])
def test_grey_is_the_luma_of_a_jpeg_and_the_grey_of_all_else(paint, encode, min_side):
    image = paint(1, 800, 600)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, options in (
        ("JPEG", {}), ("JPEG", {"progressive": True}), ("JPEG", {"exif": exif}), ("JPEG", {"subsampling": 0}),
        ("PNG", {}), ("WEBP", {"lossless": True}),
    ):  # fmt: skip
        data = encode(image, name, **options)

        grey, rgb = decode_grey(data, min_side=min_side), decode_rgb(data, min_side=min_side)

        assert (grey.mode, grey.size) == ("L", rgb.size)
        difference = np.abs(np.asarray(grey).astype(int) - np.asarray(rgb.convert("L")))
        assert difference.max() <= (20 if name == "JPEG" else 0) and difference.mean() < 0.5
    for mode in ("L", "CMYK"):
        data = encode(image.convert(mode))
        assert decode_grey(data).tobytes() == decode_rgb(data).convert("L").tobytes()


@pytest.mark.parametrize("min_side", [16, 100, 300, 5000])
def test_a_smaller_scale_still_covers_what_is_asked(paint, encode, min_side):
    data = encode(paint(1, 800, 600))

    decoded = decode_rgb(data, min_side=min_side)

    assert min(decoded.size) >= min(min_side, 600)
    assert decoded.width * 3 == decoded.height * 4
    assert (decoded.size == (800, 600)) == (min_side > 300)


@pytest.mark.parametrize("min_side", [None, 16])
@pytest.mark.parametrize("image_format", ["JPEG", "progressive JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_file_cut_anywhere_is_an_image_error_at_any_scale(paint, encode, image_format, min_side):
    options = {"progressive": True} if "progressive" in image_format else {}
    data = encode(paint(1, 400, 300), image_format.split()[-1], **options)

    for fraction in (0.02, 0.3, 0.6, 0.9):
        with pytest.raises(ImageError) as caught:
            decode_rgb(data[: int(len(data) * fraction)], min_side=min_side)
        assert caught.value.reason in ("undecodable", "not_an_image")


def test_random_bytes_and_flipped_bits_never_raise_anything_else(paint, encode):
    rng = np.random.default_rng(0)
    wholes = [encode(paint(1), name.upper()) for name in FORMATS]
    for number in range(300):
        data = bytearray(wholes[number % len(wholes)])
        for position in rng.integers(0, len(data) if number % 2 else min(64, len(data)), 4):
            data[position] = rng.integers(256)
        try:
            assert decode_rgb(bytes(data), max_pixels=10_000_000).mode == "RGB"
            probe(bytes(data), max_pixels=10_000_000)
        except ImageError as error:
            assert error.reason in ("undecodable", "not_an_image", "too_many_pixels") and error.detail


def test_reasons_are_told_apart(paint, encode):
    for data, reason in {
        b"": "empty_file",
        b"<html>": "not_an_image",
        b"\x89PNG\r\n\x1a\n" + b"\0" * 50: "undecodable",
        b"\xff\xd8\xff\xe0rest": "undecodable",
    }.items():
        with pytest.raises(ImageError) as caught:
            probe(data)
        assert caught.value.reason == reason


def test_a_size_over_the_limit_is_refused_from_the_header(paint, encode):
    data = encode(paint(1), "PNG")
    giant = data[:16] + (70_000).to_bytes(4, "big") * 2 + data[24:]

    for call in (probe, decode_rgb):
        with pytest.raises(ImageError, match="too_many_pixels: 6,912 pixels, limit 6,000"):
            call(data, max_pixels=6000)
    with pytest.raises(ImageError):
        decode_rgb(giant)


def test_our_limit_counts_and_not_that_of_pillow(encode, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # refuses from 1,001 pixels on
    image = Image.new("RGB", (40, 40), "red")

    for name in FORMATS:
        data = encode(image, PILLOW_NAMES[name])

        assert decode_rgb(data).size == (40, 40) and probe(data).width == 40
        assert decode_rgb(data, max_pixels=1600).size == (40, 40)
        for call in (probe, decode_rgb):
            with pytest.raises(ImageError, match=r"too_many_pixels: (1,600|40x40) pixels, limit 1,599"):
                call(data, max_pixels=1599)
    assert Image.MAX_IMAGE_PIXELS == 500


def test_a_picture_beyond_pillows_limit_is_decoded_when_ours_allows_it():
    side = 14_000  # 196 MP; Pillow's own limit is 179
    data = io.BytesIO()
    Image.new("1", (side, side)).save(data, "PNG", compress_level=1)

    assert probe(data.getvalue()).width == side
    with pytest.raises(ImageError, match="too_many_pixels: 196,000,000 pixels, limit 100,000,000"):
        probe(data.getvalue(), max_pixels=100_000_000)


def test_threads_with_other_limits_leave_pillows_as_it_was(paint, encode):
    before, data = Image.MAX_IMAGE_PIXELS, encode(paint(1), "WEBP")

    def work(number: int) -> str:
        try:
            return decode_rgb(data, max_pixels=100 if number % 2 else 10_000).mode
        except ImageError as error:
            return error.reason

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(200))) == ["RGB", "too_many_pixels"] * 100
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (300, 200), (257, 33), (640, 480), (320, 180), (9000, 3)])
def test_the_size_of_a_jxl_is_read_from_its_header(encode, size):
    for options in ({}, {"use_container": True}, {"lossless": True}, {"exif": b"Exif\0\0II*\0" + bytes(6)}):
        assert jxl_size(encode(Image.new("RGB", size, "red"), "JXL", **options)) == size


def test_a_giant_jxl_is_refused_before_it_is_decoded():
    bits = 0 | 3 << 1 | 2**29 << 3  # not small, 30 bits for the height
    giant = b"\xff\x0a" + (bits | 1 << 33).to_bytes(14, "little")

    with pytest.raises(ImageError, match="too_many_pixels: 536870913x536870913 pixels"):
        decode_rgb(giant)
    for cut in (b"\xff\x0a", b"\xff\x0a\xff", giant[:4], b"\0\0\0\x0cJXL \r\n\x87\n" + b"\0\0\0\4jxlc"):
        with pytest.raises(ImageError, match="undecodable"):
            probe(cut)


def test_the_header_of_a_png_is_read_without_its_pixels(paint, encode):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(paint(1), "PNG", exif=exif)
    start = data.index(b"IDAT") - 4
    chunk = data[data.index(b"eXIf") - 4 :][: 12 + int.from_bytes(data[data.index(b"eXIf") - 4 :][:4], "big")]
    behind = data.replace(chunk, b"").replace(b"\0\0\0\0IEND", chunk + b"\0\0\0\0IEND")

    assert probe(data[: start + 40]).width == 72  # cut: it could not be decoded
    assert probe(behind).width == decode_rgb(behind).width == 72


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "AVIF"])
def test_an_animation_gives_its_first_frame(paint, encode, image_format):
    frames = [paint(seed) for seed in range(3)]

    data = encode(frames[0], image_format, save_all=True, append_images=frames[1:], duration=100)

    facts = probe(data)
    assert facts.is_animated and not facts.is_pass_through and (facts.width, facts.height) == (96, 72)
    assert mean_difference(decode_rgb(data), frames[0]) < 25
    assert not probe(encode(frames[0], image_format)).is_animated


def test_an_image_error_travels_between_processes():
    error = pickle.loads(pickle.dumps(ImageError("undecodable", "broken")))

    assert (error.reason, error.detail, str(error)) == ("undecodable", "broken", "undecodable: broken")


def test_encoding_is_plain_and_repeatable(paint):
    image = paint(5)

    jpeg, png = encode_jpeg(image, quality=95), encode_png(image)

    assert jpeg == encode_jpeg(image, quality=95) and png == encode_png(image)
    assert probe(jpeg).is_pass_through and probe(png).is_pass_through
    with Image.open(io.BytesIO(jpeg)) as stored:
        assert stored.info.get("exif") is None and stored.layer[0][1:3] == (1, 1)
    assert mean_difference(decode_rgb(png), image) == 0


def test_a_few_images_are_judged_as_if_they_were_twenty():
    assert not is_too_broken(1, 2, max_broken_fraction=0.05)
    assert is_too_broken(2, 2, max_broken_fraction=0.05)
    assert not is_too_broken(5, 100, max_broken_fraction=0.05)
    assert is_too_broken(6, 100, max_broken_fraction=0.05)
    assert is_too_broken(1, 1_000_000, max_broken_fraction=0)
