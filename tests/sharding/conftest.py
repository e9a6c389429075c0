"""Pictures and configs for the tests of `sharding`, as fixtures: test folders are no packages."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sharding.config import DatasetConfig, parse_config
from sharding.schema import Workspace


def paint(seed: int, width: int = 96, height: int = 72) -> Image.Image:
    """Return an RGB picture with coarse and fine shapes, the same at every size."""
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128.0)
    for side in (3, 6, 12, 24):
        octave = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        pixels += (np.asarray(octave.resize((width, height), Image.Resampling.BICUBIC)) - 127.5) * 0.4
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, image_format: str = "JPEG", **options: Any) -> bytes:
    """Return the bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, **({"quality": 90} if image_format == "JPEG" else {}) | options)
    return buffer.getvalue()


@pytest.fixture(name="paint")
def _paint() -> Callable[..., Image.Image]:
    return paint


@pytest.fixture(name="encode")
def _encode() -> Callable[..., bytes]:
    return encode


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Write bytes, text, an object (as JSON) or a picture (by its ending) below `raw`; folders are made."""

    def write(path: str, content: bytes | str | dict[str, Any] | Image.Image, **options: Any) -> Path:
        target = tmp_path / "raw" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Image.Image):
            content.save(target, **({"quality": 90} if target.suffix == ".jpg" else {}) | options)
        elif isinstance(content, bytes):
            target.write_bytes(content)
        else:
            target.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return target

    return write


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., DatasetConfig]:
    """Build a config with one folder source `photos` at `raw`; small pictures pass; keywords replace top tables."""

    def build(**values: Any) -> DatasetConfig:
        (tmp_path / "raw").mkdir(exist_ok=True)
        merged: dict[str, Any] = {
            "name": "test",
            "sources": {"photos": {"root": str(tmp_path / "raw")}},
            "filters": {"min_pixels": 1},
            "part_size": 4,
            **values,
        }
        return parse_config(merged, DatasetConfig, name="test.toml")

    return build


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "workspace")
