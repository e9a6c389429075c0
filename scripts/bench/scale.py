"""A synthetic workspace of 6 million files through dedupe, plan, combine and report: time and memory of each.

The rows are made up so that the numbers of SoteDiffusion's tables come out: 5,628,499 pictures in eight data sets and
708 chunks, 331 pictures in the last of `newest`, 191 without an aesthetic tag; the other files are planted duplicates
and files that scan dropped. There are no pictures: manifest, captions and indexes are written directly, tars are empty
files of the right size. Every stage is a command in a process of its own, as people run it.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from scripts.bench.result import Bar, Result
from sharding.chunk import commit_chunk
from sharding.config import DatasetConfig, load_config
from sharding.schema import CAPTIONS, INDEX, LISTING, MANIFEST, PLAN, TAG_GROUP, Workspace
from sharding.shards import ShardFile
from sharding.tables import list_parts, part_name, read_part, read_parts, write_part

DATASET = Path("configs/datasets/sotediffusion.toml")
# (pictures, source, year): SoteDiffusion's model card
_COUNTS = {
    "newest": (1_848_331, "boards", 2023), "recent": (1_380_630, "boards", 2020), "mid": (993_227, "boards", 2016),
    "early": (566_152, "boards", 2012), "oldest": (160_397, "boards", 2008), "pixiv": (343_614, "pixiv", 2021),
    "visual novel cg": (231_358, "visual-novel", 2018), "anime wallpaper": (104_790, "wallpapers", 2022),
}  # fmt: skip
_NUM_FILES, _SMALL_DIVISOR = 6_000_000, 100
_NUM_WITHOUT_AESTHETIC = 191
_CHUNK_SIZE, _SHARD_SIZE = 8_000, 1_000
_NUM_NEAR, _NUM_EXACT = 250_000, 50_000
_KEPT, _NEAR, _EXACT, _DROPPED = range(4)
_IMAGE_BYTES = 180_000
_SHOWN_REPORT_LINES = 60


class _Files:
    """What is made up about every file, as arrays in the order of the manifest."""

    def __init__(self, divisor: int, hash_bytes: int) -> None:
        random = np.random.default_rng(0)
        counts = [count // divisor for count, *_ in _COUNTS.values()]
        num_kept, num_near, num_exact = sum(counts), _NUM_NEAR // divisor, _NUM_EXACT // divisor
        num_files = _NUM_FILES // divisor
        numbers = [num_kept, num_near, num_exact, num_files - num_kept - num_near - num_exact]
        copied = random.integers(0, num_kept, num_near + num_exact)
        origin = np.concatenate([np.arange(num_kept), copied, random.integers(0, num_kept, numbers[_DROPPED])])
        order = random.permutation(num_files)
        self.role = np.repeat(np.arange(4, dtype=np.int8), numbers)[order]
        self.dataset = np.repeat(np.arange(len(counts), dtype=np.int8), counts)[origin][order]
        sha256 = random.integers(0, 256, (num_files, 32), dtype=np.uint8)
        is_exact = slice(num_kept + num_near, num_kept + num_near + num_exact)
        sha256[is_exact] = sha256[origin[is_exact]]
        phash = random.integers(0, 256, (num_kept, hash_bytes), dtype=np.uint8)[origin]
        is_near = np.arange(num_kept, num_kept + num_near)
        phash[is_near, random.integers(0, hash_bytes, num_near)] ^= np.uint8(0b1001)  # two bits of one byte
        self.sha256, self.phash = sha256[order], phash[order]
        self.num_kept = num_kept
        self.num_without_aesthetic = -(-_NUM_WITHOUT_AESTHETIC // divisor)


def run(*, full: bool, data: Path | None) -> Result:
    """Run the four stages. `data` is not used: rows are synthetic."""
    divisor = 1 if full else _SMALL_DIVISOR
    overrides = [f"plan.chunk_size={_CHUNK_SIZE // divisor}", f"combine.chunk_size={_CHUNK_SIZE // divisor}"]
    config = load_config(DATASET, DatasetConfig, overrides)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder))
        files = _Files(divisor, config.dedupe.hash_size**2 // 8)
        started = time.monotonic()
        _write_manifest(workspace, config, files)
        figures |= {"files": len(files.role), "making_rows_seconds": time.monotonic() - started}
        figures |= _stage("dedupe", workspace, overrides)
        figures["dedupe_kept"] = sum(read_part(part, []).num_rows for part in list_parts(workspace.kept))
        _write_captions(workspace, files.num_without_aesthetic)
        figures |= _stage("plan", workspace, overrides)
        plan = read_parts(workspace.plan, schema=PLAN)
        figures |= _chunk_figures(plan)
        _commit_chunks(workspace, plan, files.num_without_aesthetic, shard_size=max(1, _SHARD_SIZE // divisor))
        del files, plan
        figures |= _stage("combine", workspace, overrides)
        figures |= _stage("report", workspace, overrides)
        report = (workspace.root / "report.log").read_text(encoding="utf-8").splitlines()
    return Result(
        bench="scale",
        figures=figures,
        bars=[
            Bar("dedupe_kept", at_least=sum(count for count, *_ in _COUNTS.values())),
            Bar("dedupe_peak_gigabytes", at_most=4),
            Bar("plan_seconds", at_most=120),
            Bar("plan_peak_gigabytes", at_most=2),
            Bar("chunks", at_least=708),
            Bar("in_the_last_newest_chunk", at_most=331),
            Bar("report_peak_gigabytes", at_most=4),
        ],
        full_size=full,
        peer="none",
        notes=["the first lines of the report:", *report[:_SHOWN_REPORT_LINES]],
    )


def _stage(stage: str, workspace: Workspace, overrides: list[str]) -> dict[str, float]:
    """Run a command of sharding; return its time and its largest memory. Raises RuntimeError when it fails."""
    command = [sys.executable, "-m", "sharding", stage, str(DATASET), "--workspace", str(workspace.root)]
    command += [word for override in overrides for word in ("--set", override)]
    log = workspace.root / f"{stage}.log"
    started = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{stage} ended with exit code {process.returncode}:\n{log.read_text(encoding='utf-8')}")
    peak_bytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{stage}: {seconds:,.1f} s, {peak_bytes / 1e9:.2f} GB", file=sys.stderr, flush=True)
    return {
        f"{stage}_seconds": seconds,
        f"{stage}_cpu_seconds": usage.ru_utime + usage.ru_stime,
        f"{stage}_peak_gigabytes": peak_bytes / 1e9,
    }


def _chunk_figures(plan: pa.Table) -> dict[str, float]:
    sizes = plan.group_by(["dataset", "chunk"]).aggregate([("key", "count")]).to_pylist()
    newest = {row["chunk"]: row["key_count"] for row in sizes if row["dataset"] == "newest"}
    return {"chunks": len(sizes), "in_the_last_newest_chunk": newest[max(newest)]}


# --- tables ---


def _write_manifest(workspace: Workspace, config: DatasetConfig, files: _Files) -> None:
    names = list(_COUNTS)
    sources = [_COUNTS[name][1] for name in names]
    years = np.array([_COUNTS[name][2] for name in names])
    for number, start in enumerate(range(0, len(files.role), config.part_size)):
        rows = slice(start, min(start + config.part_size, len(files.role)))
        role, dataset = files.role[rows], files.dataset[rows]
        count = len(role)
        sha256 = _hex(files.sha256[rows])
        in_source = pa.array([sources[code] for code in dataset])
        is_kept, is_near = role != _DROPPED, role == _NEAR
        columns: dict[str, Any] = {name: pa.nulls(count, MANIFEST.field(name).type) for name in MANIFEST.names}
        columns |= {name: pa.array([""] * count) for name in ("detail", "rating", "date_source")}
        columns |= {name: pa.array([b""] * count) for name in ("turned_phashes", "sketch", "local_features")}
        columns |= {
            "key": pa.array([digest[:16] for digest in sha256]),
            "sha256": pa.array(sha256),
            "dataset": pa.array([config.sources[sources[code]].dataset for code in dataset]),
            "source": in_source,
            "path": pa.array([f"{place // 1000:05d}/{place}.jpg" for place in range(rows.start, rows.stop)]),
            "num_bytes": pa.array(np.full(count, _IMAGE_BYTES)),
            "format": pa.array(["jpeg"] * count),
            "width": pa.array(np.where(is_near, 1_100, 1_500), pa.int32()),
            "height": pa.array(np.where(is_near, 800, 1_100), pa.int32()),
            "mode": pa.array(["RGB"] * count),
            "has_alpha": pa.array(np.zeros(count, bool)),
            "is_animated": pa.array(np.zeros(count, bool)),
            "is_pass_through": pa.array(np.ones(count, bool)),
            "created_at": pa.array([datetime(year, 6, 1) for year in years[dataset]], pa.timestamp("ms", tz="UTC")),
            "phash": pa.array([bits.tobytes() for bits in files.phash[rows]]),
            "status": pa.array(np.where(is_kept, "kept", "too_small")),
        }
        for name in ("general", "character", "copyright", "artist", "meta"):
            columns[f"tags_{name}"] = pa.array([["solo", "long_hair"] if name == "general" else []] * count)
        columns["custom"] = pa.array([[]] * count, MANIFEST.field("custom").type)
        listing = pa.table([columns["source"], columns["path"], columns["num_bytes"]], schema=LISTING)
        write_part(workspace.listing / part_name(number), listing, made_from="bench")
        write_part(workspace.manifest / part_name(number), pa.table(columns, schema=MANIFEST), made_from=f"{number}")


def _hex(rows: np.ndarray[Any, Any]) -> list[str]:
    text = rows.tobytes().hex()
    width = 2 * rows.shape[1]
    return [text[start : start + width] for start in range(0, len(text), width)]


def _words_of(keys: list[str], without_aesthetic: set[str]) -> tuple[pa.Array, pa.Array]:
    """Return made-up captions and their groups."""
    aesthetic = [[] if key in without_aesthetic else ["very aesthetic"] for key in keys]
    rest = ["1girl", "solo", "long hair", "looking at viewer", "school uniform", "outdoors"]
    texts = pa.array([", ".join([*words, *rest]) for words in aesthetic])
    groups = [[{"group": "aesthetic", "tags": words}] if words else [] for words in aesthetic]
    rest_group = {"group": "rest", "tags": rest}
    return texts, pa.array([[*words, rest_group] for words in groups], pa.list_(TAG_GROUP))


def _without_aesthetic(workspace: Workspace, number: int) -> set[str]:
    first = read_part(list_parts(workspace.kept)[0], ["key"]).column("key").to_pylist()
    return set(first[:number])


def _write_captions(workspace: Workspace, num_without_aesthetic: int) -> None:
    without = _without_aesthetic(workspace, num_without_aesthetic)
    for part in list_parts(workspace.kept):
        keys = read_part(part, ["key"]).column("key").to_pylist()
        table = pa.table([pa.array(keys), *_words_of(keys, without)], schema=CAPTIONS)
        write_part(workspace.captions("default") / part.name, table, made_from="bench")


def _commit_chunks(workspace: Workspace, plan: pa.Table, num_without_aesthetic: int, *, shard_size: int) -> None:
    """Commit every planned chunk with an index as pack writes it, and tars that are holes."""
    without = _without_aesthetic(workspace, num_without_aesthetic)
    for dataset, number, rows in _planned_chunks(plan):
        name = f"{dataset}/{number:04d}"
        folder = workspace.chunks / name
        folder.mkdir(parents=True)
        starts = range(0, rows.num_rows, shard_size)
        sizes = [min(shard_size, rows.num_rows - start) for start in starts]
        shards = [_shard(folder, name, shard, size) for shard, size in enumerate(sizes)]
        keys = rows.column("key").to_pylist()
        place = np.arange(rows.num_rows) % shard_size * (_IMAGE_BYTES + 4_096)
        texts, groups = _words_of(keys, without)
        columns: dict[str, Any] = {
            name: pa.array(np.full(rows.num_rows, 200), INDEX.field(name).type)
            for name in INDEX.names
            if pa.types.is_integer(INDEX.field(name).type)
        }
        columns |= {name: rows.column(name) for name in ("key", "dataset", "period", "repeats", "loss_weight")}
        columns |= {
            "shard": pa.array([shard.path for shard, size in zip(shards, sizes, strict=True) for _ in range(size)]),
            "shard_sha256": pa.array(
                [shard.sha256 for shard, size in zip(shards, sizes, strict=True) for _ in range(size)]
            ),
            "image_name": pa.array([f"{key}.jpg" for key in keys]),
            "image_offset": pa.array(place),
            "image_bytes": pa.array(np.full(rows.num_rows, _IMAGE_BYTES)),
            "caption": texts,
            "groups": groups,
            "sha256": pa.array([4 * key for key in keys]),
        }
        commit_chunk(
            folder, pa.table(columns, schema=INDEX), name=name, shards=shards, policy="default",
            shard_policy="default", made_from=name, seed=0,
        )  # fmt: skip


def _planned_chunks(plan: pa.Table) -> Iterator[tuple[str, int, pa.Table]]:
    """Yield (dataset, number, rows) of each chunk; the plan is sorted by them."""
    codes = plan.column("dataset").combine_chunks().dictionary_encode()
    numbers = plan.column("chunk").to_numpy()
    datasets = codes.indices.to_numpy()
    starts = np.flatnonzero(np.r_[True, (numbers[1:] != numbers[:-1]) | (datasets[1:] != datasets[:-1])])
    for start, end in zip(starts, np.r_[starts[1:], plan.num_rows], strict=True):
        yield codes.dictionary[int(datasets[start])].as_py(), int(numbers[start]), plan.slice(start, end - start)


def _shard(folder: Path, name: str, number: int, num_samples: int) -> ShardFile:
    sha256 = hashlib.sha256(f"{name} {number}".encode()).hexdigest()
    path = folder / f"shard-{number:05d}-{sha256[:12]}.tar"
    num_bytes = num_samples * (_IMAGE_BYTES + 4_096)
    path.touch()
    os.truncate(path, num_bytes)
    return ShardFile(path=path.name, sha256=sha256, num_bytes=num_bytes, num_samples=num_samples)
