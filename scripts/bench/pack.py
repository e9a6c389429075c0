"""Pack pictures that pass through, beside webdataset's bare TarWriter and a plain copy of the same files.

The files are random bytes of camera sizes behind a JPEG header, read from the page cache of the disk that holds
temporary files (TMPDIR). One round does each in turn and the medians over the rounds are compared: per core by CPU
seconds, which other programs on the machine disturb least, two workers by wall time. Only pack waits for the disk.
"""

import hashlib
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from scripts.bench.result import Bar, Result
from sharding.chunk import commit_chunk
from sharding.packing.rows import _RECORDS
from sharding.packing.shard import FinishedShard, ShardTask, pack_shard
from sharding.packing.stored_image import ImagePolicy
from sharding.schema import INDEX
from sharding.workers import make_pool

_NUM_FILES, _FULL_FILES = 400, 1_600
_ROUNDS, _FULL_ROUNDS = 3, 7
_SHARD_SIZE = 200
_POLICY = ImagePolicy(
    jpeg_quality=95, lossless_as_png=False, reencode="needed", max_pixels=0, pass_through_formats=(),
    min_source_pixels=0, max_source_pixels=200_000_000,
)  # fmt: skip


def run(*, full: bool, data: Path | None) -> Result:
    """Measure on made files, or on the files of a folder, each taken as a JPEG that passes through."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "raw"
        root.mkdir()
        files = _copy(data, root) if data is not None else _make(root, _FULL_FILES if full else _NUM_FILES)
        rows = _rows(files)
        num_bytes = sum(file.stat().st_size for file in files)
        seconds = _measure(Path(folder), files, rows, rounds=_FULL_ROUNDS if full else _ROUNDS)
    rates = {name: num_bytes / 1e6 / statistics.median(values) for name, values in seconds.items()}
    ratios = [theirs / ours for theirs, ours in zip(seconds["tarwriter"], seconds["pack"], strict=True)]
    against_cp = [theirs / ours for theirs, ours in zip(seconds["cp_wall"], seconds["two_workers_wall"], strict=True)]
    return Result(
        bench="pack",
        figures={
            "files": len(files),
            "megabytes": num_bytes / 1e6,
            "pack_megabytes_per_cpu_second": rates["pack"],
            "tarwriter_megabytes_per_cpu_second": rates["tarwriter"],
            "two_sha256_megabytes_per_cpu_second": rates["two_sha256"],
            "against_tarwriter": statistics.median(ratios),
            "two_workers_megabytes_per_second": rates["two_workers_wall"],
            "cp_megabytes_per_second": rates["cp_wall"],
            "two_workers_against_cp": statistics.median(against_cp),
        },
        bars=[Bar("against_tarwriter", at_least=1.0), Bar("two_workers_against_cp", at_least=0.7)],
        full_size=full,
        peer=f"webdataset {version('webdataset')} TarWriter; shutil.copyfile",
        notes=[
            f"{_SHARD_SIZE} samples per shard, on the disk (fsync) when pack goes on; the others do not wait",
            "pack hashes each byte twice: the source's SHA-256 is checked, the tar's is written; TarWriter hashes none",
            "two_sha256: those two hashes alone, from memory, the ceiling of one core",
        ],
    )


def _make(root: Path, count: int) -> list[Path]:
    random = np.random.default_rng(0)
    files = [root / f"{number:05d}.jpg" for number in range(count)]
    for file in files:
        file.write_bytes(b"\xff\xd8\xff" + random.bytes(int(random.integers(200_000, 1_800_000))))
    return files


def _copy(data: Path, root: Path) -> list[Path]:
    sources = [path for path in sorted(data.rglob("*")) if path.is_file() and path.suffix.lower() in (".jpg", ".png")]
    if not sources:
        raise FileNotFoundError(f"--data {data}: no JPEG or PNG in it")
    return [Path(shutil.copyfile(path, root / f"{number:05d}.jpg")) for number, path in enumerate(sources)]


def _rows(files: list[Path]) -> pa.Table:
    """Return what `pack` joins for each picture: record, plan and caption."""
    records = []
    for file in files:
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        record: dict[str, Any] = dict.fromkeys(_RECORDS.names)
        record |= {"key": sha256[:16], "sha256": sha256, "source": "photos", "path": file.name, "format": "jpeg",
                   "width": 1_024, "height": 1_024, "num_bytes": file.stat().st_size, "has_alpha": False,
                   "is_animated": False, "is_pass_through": True, "tags_general": ["solo", "sky"] * 15}  # fmt: skip
        records.append(record)
    count = len(records)
    table = pa.Table.from_pylist(records, schema=_RECORDS)
    groups = pa.array([[{"group": "general", "tags": ["solo", "sky"] * 15}]] * count, INDEX.field("groups").type)
    more = {"dataset": ["photos"] * count, "period": [""] * count, "repeats": [1] * count, "loss_weight": [1.0] * count,
            "text": ["solo, sky, " * 15] * count, "groups": groups}  # fmt: skip
    for name, values in more.items():
        table = table.append_column(name, values if isinstance(values, pa.Array) else pa.array(values))
    return table


def _measure(folder: Path, files: list[Path], rows: pa.Table, *, rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {}
    contents = files[0].read_bytes() * 8

    def measure(name: str, work: Callable[[], object], *, wall: bool = False) -> None:
        started = time.perf_counter() if wall else _cpu_seconds()
        work()
        seconds.setdefault(name, []).append((time.perf_counter() if wall else _cpu_seconds()) - started)
        for path in (folder / "out", folder / "copies"):
            shutil.rmtree(path, ignore_errors=True)

    num_bytes = sum(file.stat().st_size for file in files)
    with make_pool(2) as pool:
        list(pool.map(_warm_up, range(4)))
        for _ in range(rounds):
            measure("tarwriter", lambda: _tarwriter(folder, files))
            measure("pack", lambda: _pack(folder, rows, None))
            measure("cp_wall", lambda: _cp(folder, files), wall=True)
            measure("two_workers_wall", lambda: _pack(folder, rows, pool), wall=True)
            started = _cpu_seconds()
            for _ in range(2):
                hashlib.sha256(contents).hexdigest()
            scale = num_bytes / len(contents)
            seconds.setdefault("two_sha256", []).append((_cpu_seconds() - started) * scale)
    return seconds


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _warm_up(_: int) -> None:
    time.sleep(0.2)  # long enough that each worker gets one


def _pack(folder: Path, rows: pa.Table, pool: ProcessPoolExecutor | None) -> None:
    out = folder / "out" / "photos" / "0000"
    starts = range(0, rows.num_rows, _SHARD_SIZE)
    tasks = [
        ShardTask(out, number, rows.slice(start, _SHARD_SIZE), {"photos": folder / "raw"}, _POLICY)
        for number, start in enumerate(starts)
    ]
    finished: list[FinishedShard] = list(pool.map(pack_shard, tasks) if pool is not None else map(pack_shard, tasks))
    assert all(one.shard is not None and not one.drops.num_rows for one in finished)
    commit_chunk(
        out, pa.concat_tables([one.rows for one in finished]), name="photos/0000",
        shards=[one.shard for one in finished if one.shard is not None], policy="p", shard_policy="p",
        made_from="bench", seed=0,
    )  # fmt: skip


def _tarwriter(folder: Path, files: list[Path]) -> None:
    import webdataset

    out = folder / "out"
    out.mkdir(parents=True)
    facts, text = b"{" + b" " * 900 + b"}", b"solo, sky, " * 15
    for number in range(0, len(files), _SHARD_SIZE):
        with webdataset.TarWriter(str(out / f"{number:05d}.tar")) as writer:
            for file in files[number : number + _SHARD_SIZE]:
                writer.write({"__key__": file.stem, "jpg": file.read_bytes(), "json": facts, "txt": text})


def _cp(folder: Path, files: list[Path]) -> None:
    copies = folder / "copies"
    copies.mkdir()
    for file in files:
        shutil.copyfile(file, copies / file.name)
