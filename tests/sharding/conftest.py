"""Pictures and configs for the tests of `sharding`, as fixtures: test folders are no packages."""

import io
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from sharding import cli
from sharding.config import DatasetConfig, parse_config
from sharding.schema import CAPTIONS, Workspace
from sharding.tables import part_name, read_parts, write_part


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
def hamming() -> Callable[[bytes, bytes], int]:
    """Count the bits in which two perceptual hashes differ."""
    return lambda left, right: (int.from_bytes(left, "big") ^ int.from_bytes(right, "big")).bit_count()


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


@pytest.fixture
def run(
    tmp_path: Path, save: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str]]]:
    """Return a function that runs a command over a small dataset: 6 pictures, one duplicate, one broken file.

    It returns (exit code, stdout); stderr is in `run.err`. The config is `test.toml`, the workspace `ws`.
    """
    for number in range(6):
        save(f"{number}.jpg", paint(number))
    save("copy.jpg", (tmp_path / "raw" / "0.jpg").read_bytes())
    save("broken.jpg", b"no picture")
    config = tmp_path / "test.toml"
    config.write_text(
        f'name = "t"\nmax_broken_fraction = 0.5\n[sources.photos]\nroot = {json.dumps(str(tmp_path / "raw"))}\n'
        "[filters]\nmin_pixels = 1\n[plan]\nchunk_size = 4\n"
    )

    def run_command(command: str, *arguments: str, key: Sequence[str] = ()) -> tuple[int, str]:
        workers = ["--workers", "0"] if command in ("scan", "pack", "verify") else []
        code = cli.main([command, *key, str(config), "--workspace", str(tmp_path / "ws"), *workers, *arguments])
        captured = capsys.readouterr()
        run_command.err = captured.err
        return code, captured.out

    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield run_command
    root.handlers[:] = handlers  # a command configures the root logger, which outlives the test
    root.setLevel(level)


@pytest.fixture
def write_captions(tmp_path: Path) -> Callable[[], None]:
    """Return a function that captions every kept key of the workspace that `run` works in."""

    def write() -> None:
        workspace = Workspace(tmp_path / "ws")
        keys = read_parts(workspace.kept, ["key"]).column("key").to_pylist()
        rows = [{"key": key, "text": "solo", "groups": []} for key in keys]
        table = pa.Table.from_pylist(rows, schema=CAPTIONS)
        write_part(workspace.captions("default") / part_name(0), table, made_from="x")

    return write
