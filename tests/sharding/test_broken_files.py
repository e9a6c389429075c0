"""Broken and odd files: each becomes a record with a reason or a kept one, in bounded time and memory.

The small set is made here. Public suites (the pictures of Pillow's tests, gdk-pixbuf-tests) are read from the folders
that the environment variable CHUNKLINE_BROKEN_SUITES names, separated as in PATH.
"""

import os
import resource
import struct
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sharding.images
from sharding.config import DedupeConfig, FilterConfig
from sharding.scanning.record import FileTask, Rules, make_record

SUITES = [Path(folder) for folder in os.environ.get("CHUNKLINE_BROKEN_SUITES", "").split(os.pathsep) if folder]
RULES = Rules(
    filters=FilterConfig(min_pixels=0, max_aspect=1e9, animated="first_frame"), dedupe=DedupeConfig(turns=("mirror",))
)
REASONS = {"undecodable", "not_an_image", "empty_file", "too_many_pixels"}


def record_of(path: Path) -> dict[str, object]:
    return make_record(FileTask("s", "s", "folder", path.parent, path.name, path.stat().st_size), RULES)


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "darwin" else 1024) / 1024


def png(width: int, height: int, body: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def gif(width: int, height: int, frame: tuple[int, int]) -> bytes:
    control = b"\x21\xf9\x04\x09\x00\x00\x00\x00"  # dispose to background, transparent
    image = b"," + struct.pack("<4H", 0, 0, *frame) + b"\x00\x02\x02\x44\x01\x00;"
    return b"GIF89a" + struct.pack("<2H", width, height) + b"\x80\x00\x00" + bytes(6) + control + image


def tiff(entries: list[tuple[int, int, int, int]]) -> bytes:
    table = b"".join(struct.pack("<2H2I", *entry) for entry in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + table + bytes(4)


BROKEN = {
    "empty.jpg": (b"", "empty_file"),
    "page.jpg": (b"<html><body>404</body></html>", "not_an_image"),
    "zeros.png": (bytes(5000), "not_an_image"),
    "bomb.png": (png(60_000, 60_000, zlib.compress(bytes(100))), "too_many_pixels"),
    "stops.png": (png(500, 500, zlib.compress(bytes(100))), "undecodable"),
    "no_zlib.png": (png(50, 50, b"no zlib stream"), "undecodable"),
    "endless.png": (png(4, 4, zlib.compress(bytes(50_000_000), 9)), "kept"),
    "negative.png": (png(2**31, 1, b""), "too_many_pixels"),
    "bomb.gif": (gif(65_535, 65_535, (1, 1)), "too_many_pixels"),
    "bomb_frame.gif": (gif(10, 10, (65_535, 65_535)), "too_many_pixels"),
    "bomb.bmp": (b"BM" + struct.pack("<3I", 70, 0, 54) + struct.pack("<I2i2H6I", 40, 2**24, 2**24, 1, 24, *[0] * 6),
                 "too_many_pixels"),
    "bomb.tiff": (tiff([(256, 4, 1, 2**30), (257, 4, 1, 2**30), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1),
                        (273, 4, 1, 8), (277, 3, 1, 1), (279, 4, 1, 10)]), "too_many_pixels"),
    "loop.tiff": (b"II*\0\x08\0\0\0" + struct.pack("<HI", 0, 8), "undecodable"),
    "marker.jpg": (b"\xff\xd8\xff\xc0\x00\x03\x08", "undecodable"),
    "bomb.jxl": (b"\xff\x0a" + (3 << 1 | 2**29 << 3 | 1 << 33).to_bytes(14, "little"), "too_many_pixels"),
    "riff.webp": (b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f\xff\xff\xff\x0f\x88\x88\x08\0", "too_many_pixels"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_has_a_reason_and_costs_little(tmp_path, name):
    data, status = BROKEN[name]
    (tmp_path / name).write_bytes(data)
    peak, start = peak_megabytes(), time.perf_counter()

    record = record_of(tmp_path / name)

    assert record["status"] == status, record["detail"]
    assert status == "kept" or record["detail"]
    assert peak_megabytes() - peak < 300 and time.perf_counter() - start < 10


@pytest.mark.parametrize(
    ("name", "image_format", "mode"),
    [
        ("picture.png", "JPEG", "RGB"),
        ("picture.jpg", "PNG", "RGBA"),
        ("picture.gif", "WEBP", "RGB"),
        ("picture.webp", "AVIF", "RGB"),
        ("picture.jpg", "PNG", "I;16"),
        ("picture.png", "TIFF", "F"),
    ],
)
def test_a_wrong_ending_and_an_odd_mode_are_no_fault(tmp_path, paint, name, image_format, mode):
    image = paint(1, 200, 150)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    image = image if image.mode == mode else image.convert(mode)
    with (tmp_path / name).open("wb") as stream:
        image.save(stream, image_format)

    record = record_of(tmp_path / name)

    assert (record["status"], record["format"], record["width"]) == ("kept", image_format.lower(), 200)
    assert len(record["phash"]) == len(record["turned_phashes"]) == 32 and any(record["phash"])


@pytest.mark.skipif(not SUITES, reason="CHUNKLINE_BROKEN_SUITES names no folders with broken files")
@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
def test_every_file_of_a_public_suite_is_kept_or_has_a_reason(suite):
    files = [path for path in sorted(suite.rglob("*")) if path.is_file()]
    peak = peak_megabytes()

    for path in files:
        start = time.perf_counter()
        record = record_of(path)

        assert record["status"] == "kept" or (record["status"] in REASONS and record["detail"]), path
        assert time.perf_counter() - start < 20, path
    assert len(files) > 100 and peak_megabytes() - peak < 500


def test_one_decode_fills_every_column_that_is_asked_for(tmp_path, paint, monkeypatch):
    paint(1, 900, 700).save(tmp_path / "picture.jpg")
    dedupe = DedupeConfig(turns=("mirror", "rotate_90"), keep_variants=True, find_crops=True)
    decode, calls = sharding.images._decode, []
    monkeypatch.setattr(sharding.images, "_decode", lambda *a, **k: (calls.append(1), decode(*a, **k))[1])

    record = make_record(
        FileTask("s", "s", "folder", tmp_path, "picture.jpg", 1),
        Rules(filters=FilterConfig(min_pixels=0), dedupe=dedupe),
    )

    assert record["status"] == "kept" and calls == [1]
    assert (len(record["phash"]), len(record["turned_phashes"])) == (32, 64)
    assert record["sketch"] and record["local_features"]
