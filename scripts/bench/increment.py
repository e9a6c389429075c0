"""Add new pictures to a scanned and deduped set: what is decoded again, and what dedupe's search costs.

Real pictures are scanned, some are added, and the files that the second scan reads are counted. Then a synthetic
manifest is deduped, new parts are added (a fifth of them near copies of old ones), and the same command runs again;
every run is a process of its own. At last all tables are made again from nothing and compared byte for byte.
"""

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from scripts.bench.result import Bar, Result
from sharding.config import DatasetConfig, load_config
from sharding.scan import scan
from sharding.schema import MANIFEST, Workspace
from sharding.tables import part_name, write_part

DEMO_PICTURES = Path(__file__).parents[1] / "demo_pictures"
_OLD, _NEW = 100_000, 1_000
_FULL_OLD, _FULL_NEW = 5_600_000, 50_000
_ROWS_PER_PART = 8_000
_HASH_BYTES = 32
_NEAR_SHARE = 5
_SUFFIXES = (".jpg", ".png", ".webp")


def run(*, full: bool, data: Path | None) -> Result:
    """Measure both. data: folder of real pictures to scan; by default the demo's."""
    num_old, num_new = (_FULL_OLD, _FULL_NEW) if full else (_OLD, _NEW)
    with tempfile.TemporaryDirectory() as folder:
        figures = _scan_twice(Path(folder) / "real", data or DEMO_PICTURES)
        figures |= _dedupe_thrice(Path(folder) / "made", num_old, num_new)
    return Result(
        bench="increment",
        figures=figures,
        bars=[
            Bar("read_again", at_most=0),
            Bar("search_seconds", at_most=120),
            Bar("equals_a_full_run", at_least=1),
            Bar("peak_gigabytes", at_most=4),
        ],
        full_size=full,
        peer="a full run of the same command",
    )


def _scan_twice(folder: Path, pictures: Path) -> dict[str, float]:
    """Scan nine tenths of the pictures, then all; return how many of the old ones were read again."""
    files = sorted(path for path in pictures.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
    config = _config(folder)
    num_old = len(files) * 9 // 10
    for number, path in enumerate(files):
        if number == num_old:
            scan(config, Workspace(folder / "ws"), workers=0)
        shutil.copy(path, folder / "raw" / f"{number:06d}{path.suffix}")
    report = scan(config, Workspace(folder / "ws"), workers=0)
    num_read = report.changes.get("read", 0)
    return {"scanned": num_old, "added": len(files) - num_old, "read_again": num_read - (len(files) - num_old)}


def _dedupe_thrice(folder: Path, num_old: int, num_new: int) -> dict[str, float]:
    _config(folder)
    workspace = Workspace(folder / "ws")
    random = np.random.default_rng(0)
    old = random.integers(0, 256, (num_old, _HASH_BYTES), dtype=np.uint8)
    new = random.integers(0, 256, (num_new, _HASH_BYTES), dtype=np.uint8)
    num_near = num_new // _NEAR_SHARE
    new[:num_near] = old[random.integers(0, num_old, num_near)]
    new[np.arange(num_near), random.integers(0, _HASH_BYTES, num_near)] ^= np.uint8(0b101)
    first_new = _write_parts(workspace, old, first_part=0, random=random)
    first = _dedupe(folder)
    _write_parts(workspace, new, first_part=first_new, random=random)
    increment = _dedupe(folder)
    grown = _tables(workspace)
    shutil.rmtree(workspace.dedupe)
    whole = _dedupe(folder)
    return {
        "old_pictures": num_old,
        "new_pictures": num_new,
        "searched_pictures": increment["num_searched"],
        "search_seconds": increment["search_seconds"],
        "command_seconds": increment["seconds"],
        "command_cpu_seconds": increment["cpu_seconds"],
        "first_search_seconds": first["search_seconds"],
        "full_search_seconds": whole["search_seconds"],
        "full_command_seconds": whole["seconds"],
        "full_command_cpu_seconds": whole["cpu_seconds"],
        "equals_a_full_run": float(grown == _tables(workspace)),
        "peak_gigabytes": _children_peak_gigabytes(),
    }


def _config(folder: Path) -> DatasetConfig:
    (folder / "raw").mkdir(parents=True)
    path = folder / "bench.toml"
    path.write_text(
        f'name = "bench"\nmax_broken_fraction = 1.0\n[sources.made]\nroot = {json.dumps(str(folder / "raw"))}\n'
    )
    return load_config(path, DatasetConfig)


def _dedupe(folder: Path) -> dict[str, float]:
    """Run the command; return its time and what it says of its search in events.jsonl."""
    command = [
        sys.executable,
        "-m",
        "sharding",
        "dedupe",
        str(folder / "bench.toml"),
        "--workspace",
        str(folder / "ws"),
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    seconds = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    event: dict[str, Any] = json.loads((folder / "ws" / "events.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        **{name: event[name] for name in ("search_seconds", "num_searched")},
    }


def _children_peak_gigabytes() -> float:
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def _tables(workspace: Workspace) -> dict[str, bytes]:
    parts = sorted(workspace.dedupe.rglob("*.parquet"))
    return {str(path.relative_to(workspace.root)): path.read_bytes() for path in parts}


def _write_parts(
    workspace: Workspace, hashes: npt.NDArray[np.uint8], *, first_part: int, random: np.random.Generator
) -> int:  # fmt: skip
    """Write manifest parts of made-up records with these hashes; return the number of the next part."""
    number = first_part
    for start in range(0, len(hashes), _ROWS_PER_PART):
        rows = hashes[start : start + _ROWS_PER_PART]
        count = len(rows)
        sha256 = [bits.tobytes().hex() for bits in random.integers(0, 256, (count, 32), dtype=np.uint8)]
        columns: dict[str, Any] = {name: pa.nulls(count, MANIFEST.field(name).type) for name in MANIFEST.names}
        columns |= {
            "key": pa.array([digest[:16] for digest in sha256]),
            "sha256": pa.array(sha256),
            "source": pa.array(["made"] * count),
            "dataset": pa.array(["made"] * count),
            "path": pa.array([f"{number:05d}/{row:05d}.jpg" for row in range(count)]),
            "num_bytes": pa.array(random.integers(100_000, 900_000, count), pa.int64()),
            "format": pa.array(["jpeg"] * count),
            "width": pa.array(random.integers(800, 3000, count), pa.int32()),
            "height": pa.array(random.integers(800, 3000, count), pa.int32()),
            "phash": pa.array([bits.tobytes() for bits in rows], pa.binary()),
            "rating": pa.array(["general"] * count),
            "tags_general": pa.array([["1girl", "solo", "long_hair"]] * count, MANIFEST.field("tags_general").type),
            "status": pa.array(["kept"] * count),
        }
        write_part(workspace.manifest / part_name(number), pa.table(columns, schema=MANIFEST), made_from=str(number))
        number += 1
    return number
