"""Colours survive decoding: profiles of wide gamut, 16 bits, CMYK; against sums written out here."""

import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from sharding.images import decode_grey, decode_rgb, probe

XYZ_OF_SRGB = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])  # D50
XYZ_OF_DISPLAY_P3 = np.array([[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])
XYZ_OF_ADOBE_RGB = np.array([[0.6097, 0.2053, 0.1492], [0.3111, 0.6257, 0.0632], [0.0195, 0.0609, 0.7446]])
COLOURS = np.array([[200, 60, 40], [30, 160, 60], [60, 70, 210], [128, 128, 128], [255, 255, 255], [230, 200, 90]])


def icc_profile(to_xyz: np.ndarray, gamma: float, name: str) -> bytes:
    """Return a matrix profile (ICC v2). to_xyz: 3 × 3, columns are the primaries at D50."""

    def xyz(values: np.ndarray) -> bytes:
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(float(value) * 65536) for value in values))

    text = name.encode() + b"\0"
    curve = b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(gamma * 256))
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": xyz(np.array([0.9642, 1.0, 0.8249])),
        **{kind: xyz(column) for kind, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), to_xyz.T, strict=True)},
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
    }
    table, body = struct.pack(">I", len(tags)), b""
    for kind, data in tags.items():
        table += kind + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = 128 + len(table) + len(body)
    header = struct.pack(">I4sI4s4s4s", size, b"none", 0x02200000, b"mntr", b"RGB ", b"XYZ ")
    header += struct.pack(">6H4s", 2024, 1, 1, 0, 0, 0, b"acsp") + bytes(28)
    header += struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + table + body


def expected_srgb(colours: np.ndarray, to_xyz: np.ndarray, gamma: float) -> np.ndarray:
    linear = (colours / 255) ** gamma @ to_xyz.T @ np.linalg.inv(XYZ_OF_SRGB).T
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize(
    ("to_xyz", "gamma", "name"),
    [
        (XYZ_OF_DISPLAY_P3, 2.2, "Display P3-like"),
        (XYZ_OF_ADOBE_RGB, 2.19921875, "AdobeRGB-like"),
        (XYZ_OF_SRGB, 1.0, "sRGB in name, linear light"),
    ],
)
def test_a_picture_of_another_gamut_gets_its_srgb_colours(encode, image_format, to_xyz, gamma, name):
    blocks = np.repeat(np.repeat(COLOURS[None].astype(np.uint8), 64, axis=0), 64, axis=1)
    options = {"quality": 100, "subsampling": 0} if image_format == "JPEG" else {}
    options |= {"lossless": True} if image_format == "WEBP" else {}

    data = encode(Image.fromarray(blocks), image_format, icc_profile=icc_profile(to_xyz, gamma, name), **options)

    assert not probe(data).is_pass_through
    for min_side in (None, 16):
        decoded = np.asarray(decode_rgb(data, min_side=min_side)).astype(int)
        step = decoded.shape[1] // len(COLOURS)
        found = decoded[decoded.shape[0] // 2, step // 2 :: step]
        assert np.abs(found - expected_srgb(COLOURS, to_xyz, gamma)).max() <= (4 if gamma == 1 else 2)
        grey = decode_rgb(data, min_side=min_side).convert("L")
        assert decode_grey(data, min_side=min_side).tobytes() == grey.tobytes()


def test_a_profile_that_is_srgb_in_all_but_name_passes_through(encode):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    renamed = srgb.replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be")).replace(b"sRGB", b"mine")

    assert probe(encode(Image.new("RGB", (8, 8), "red"), icc_profile=renamed)).is_pass_through


def test_sixteen_bits_per_colour_are_scaled_and_encoded_anew(tmp_path, encode):
    levels = np.array([[0, 257, 32896, 65535]], dtype=">u2")
    rows = b"".join(b"\0" + np.repeat(levels[0], 3).tobytes() for _ in range(2))
    data = _png(4, 2, depth=16, colour_type=2, rows=rows)

    facts = probe(data)

    assert facts.mode == "RGB" and not facts.is_pass_through
    assert np.asarray(decode_rgb(data))[0].tolist() == [[level] * 3 for level in (0, 1, 128, 255)]


def test_cmyk_is_turned_into_colours_in_full_and_small(encode):
    image = Image.new("CMYK", (640, 640), (0, 255, 255, 0))

    for data in (encode(image, quality=95), encode(image, "TIFF")):
        for min_side in (None, 64):
            red, green, blue = decode_rgb(data, min_side=min_side).getpixel((20, 20))
            assert red > 245 and green < 10 and blue < 10


def _png(width: int, height: int, *, depth: int, colour_type: int, rows: bytes) -> bytes:
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body
