"""loader: what a training process gets per core, beside the bare decode and resize that it cannot do without.

Camera-size JPEGs in a chunk, buckets of 1024 x 1024. Rounds alternate in one process and the best CPU seconds of each
count: the bare decode (at the same DCT scale) and resize of bytes in memory; our loader (read, checksum, decode,
resize, crop, flip, caption, batch); webdataset over the same tars and a torch DataLoader over files, both with the
same decode and resize. Then one worker feeds a step that sleeps half as long again as the worker was seen to need for a
micro-batch: how long the step waits.
"""

import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from scripts.bench.result import Bar, Result
from scripts.bench.scan import make_pictures
from sharding.chunk import Chunk, Sample, commit_chunk, write_shard
from sharding.images import decode_rgb, probe
from training.batch_plan import BatchPlan, make_batch_plan
from training.buckets import BucketSettings, placement
from training.chunk_data import ChunkData, ChunkSource, PixelSettings, make_loader
from training.loading.pixels import RESAMPLING, resized_image

_DEMO = Path(__file__).parents[1] / "demo_pictures"
_NUM_PICTURES, _FULL_PICTURES = 4, 12
_SAMPLES_PER_PICTURE = 8
_ROUNDS, _FULL_ROUNDS = 2, 5
_BUCKETS = BucketSettings(resolution_area=1024 * 1024, step=64)
_MICRO_BATCH = 4
_STEP_OF_WORKER = 1.5
_TAGS = ["solo", "sky", "cloud", "outdoors", "tree"] * 5


def run(*, full: bool, data: Path | None) -> Result:
    """Measure and return the figures. full: 96 samples of 12 pictures instead of 32 of 4; more rounds."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pictures = make_pictures(folder, data or _DEMO, num_pictures=_FULL_PICTURES if full else _NUM_PICTURES)
        chunk, plan, files = make_bench_chunk(folder, pictures["baseline"])
        seconds = _measure(chunk, plan, files, rounds=_FULL_ROUNDS if full else _ROUNDS)
        levels = [_levels_from_full_decode(path.read_bytes()) for path in pictures["baseline"]]
        figures = {
            "images": float(plan.num_images),
            "loader_share_of_bare": seconds["bare"] / seconds["loader"],
            "webdataset_share_of_bare": seconds["bare"] / seconds["webdataset"],
            "files_share_of_bare": seconds["bare"] / seconds["files"],
            "full_decode_share_of_bare": seconds["bare"] / seconds["full_decode"],
            "bare_ms_per_image": seconds["bare"] / plan.num_images * 1000,
            "loader_ms_per_image": seconds["loader"] / plan.num_images * 1000,
            "waiting_share": min(_waiting_share(chunk, plan) for _ in range(_FULL_ROUNDS if full else _ROUNDS)),
            "levels_from_full_decode": float(np.mean(levels)),
            "levels_from_full_decode_worst": max(levels),
        }
    return Result(
        bench="loader",
        figures=figures,
        bars=[
            Bar("loader_share_of_bare", at_least=0.85),
            Bar("waiting_share", at_most=0.02),
            Bar("levels_from_full_decode", at_most=2),
        ],
        full_size=full,
        peer=f"webdataset {version('webdataset')}, torch {version('torch')} DataLoader over files",
        notes=[
            "shares are of CPU seconds in one process; peers do not crop, check, make captions or batches",
            f"waiting: one worker, a step sleeps {_STEP_OF_WORKER:g} x what the worker needs for a micro-batch; by the "
            "clock, the least of all rounds: a machine that does other work, too, shows more",
            "full_decode: Pillow's decode of all pixels and the same resize; levels: mean difference from it, of 255",
        ],
    )


def make_bench_chunk(folder: Path, pictures: list[Path]) -> tuple[Chunk, BatchPlan, list[tuple[Path, int, int]]]:
    """Return a chunk of the pictures, each several times, its plan, and the same samples as files with their sizes."""
    samples, files = [], []
    (folder / "files").mkdir()
    for number in range(len(pictures) * _SAMPLES_PER_PICTURE):
        path, key = pictures[number % len(pictures)], f"{number:016x}"
        content = path.read_bytes()
        facts = probe(content)
        size = {"width": facts.width, "height": facts.height}
        row = {
            **size, "groups": [{"group": "general", "tags": _TAGS}], "period": "", "dataset": "bench", "repeats": 1,
            "loss_weight": 1.0,
        }  # fmt: skip
        samples.append(Sample(key, f"{key}.jpg", content, size, ", ".join(_TAGS), row))
        files.append((Path(shutil.copyfile(path, folder / "files" / f"{key}.jpg")), facts.width, facts.height))
    where = folder / "chunks" / "bench" / "0000"
    shard, rows = write_shard(where, 0, samples)
    chunk = commit_chunk(
        where, rows, name="bench/0000", shards=[shard], policy="p", shard_policy="p", made_from="bench", seed=0
    )
    plan = make_batch_plan(
        chunk.read_index(), bucket_settings=_BUCKETS, micro_batch_size=_MICRO_BATCH, micro_batches_per_step=4, seed=0,
        epoch=0, chunk=chunk.name,
    )  # fmt: skip
    return chunk, plan, files


def _measure(chunk: Chunk, plan: BatchPlan, files: list[tuple[Path, int, int]], *, rounds: int) -> dict[str, float]:
    contents = [(path.read_bytes(), width, height) for path, width, height in files]
    calls: dict[str, Callable[[], Any]] = {
        "bare": lambda: [_decoded(*one) for one in contents],
        "loader": lambda: [batch.images for batch in make_loader(_data(chunk, plan), workers=0)],
        "webdataset": lambda: list(_webdataset(chunk)),
        "files": lambda: list(DataLoader(_Files(files), batch_size=None)),
        "full_decode": lambda: [_fully_decoded(data) for data, _, _ in contents],
    }
    best: dict[str, float] = {}
    for _ in range(rounds):
        for name, call in calls.items():
            started = _cpu_seconds()
            call()
            seconds = _cpu_seconds() - started
            best[name] = min(best.get(name, seconds), seconds)
    return best


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _data(chunk: Chunk, plan: BatchPlan) -> ChunkData:
    pixels = PixelSettings(flip_fraction=0.5)
    return ChunkData(ChunkSource.of_chunk(chunk), plan, rank=0, world_size=1, pixels=pixels)


def _decoded(data: bytes, width: int, height: int) -> npt.NDArray[np.uint8]:
    return np.asarray(resized_image(data, width, height, placement=placement(width, height, settings=_BUCKETS)))


def _fully_decoded(data: bytes) -> npt.NDArray[np.uint8]:
    full = decode_rgb(data)
    placed = placement(*full.size, settings=_BUCKETS)
    return np.asarray(full.resize((placed.resized_width, placed.resized_height), RESAMPLING))


def _levels_from_full_decode(data: bytes) -> float:
    facts = probe(data)
    ours = _decoded(data, facts.width, facts.height).astype(np.int16)
    return float(np.abs(ours - _fully_decoded(data)).mean())


# --- peers ---


def _webdataset(chunk: Chunk) -> Iterator[torch.Tensor]:
    """Sequential tars, decoded as we do; sizes come from KEY.json."""
    import json

    import webdataset

    def decode(sample: dict[str, Any]) -> torch.Tensor:
        facts = json.loads(sample["json"])
        return _as_tensor(_decoded(sample["jpg"], facts["width"], facts["height"]))

    urls = [str(chunk.shard_path(shard.path)) for shard in chunk.info.shards]
    pipeline: Iterator[torch.Tensor] = iter(webdataset.WebDataset(urls, shardshuffle=False).map(decode))
    return pipeline


class _Files(Dataset[torch.Tensor]):
    """Pictures in a folder."""

    def __init__(self, files: list[tuple[Path, int, int]]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> torch.Tensor:
        path, width, height = self._files[number]
        return _as_tensor(_decoded(path.read_bytes(), width, height))


def _as_tensor(pixels: npt.NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()


# --- waiting ---


def _waiting_share(chunk: Chunk, plan: BatchPlan) -> float:
    """Return the share of the time, from the first batch on, that a training process waits for one worker."""
    loader = make_loader(_data(chunk, plan), workers=1, prefetch=4)
    next(loader)
    started = time.perf_counter()
    num_batches = sum(1 for _ in loader)
    step_seconds = _STEP_OF_WORKER * (time.perf_counter() - started) / num_batches
    loader = make_loader(_data(chunk, plan), workers=1, prefetch=4)
    next(loader)
    waited, started = 0.0, time.perf_counter()
    while True:
        time.sleep(step_seconds)
        asked = time.perf_counter()
        if next(loader, None) is None:
            return waited / (asked - started)
        waited += time.perf_counter() - asked
