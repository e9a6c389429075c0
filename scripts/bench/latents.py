"""latents: what a training process loads per second of CPU, from latents encoded ahead and from pixels.

The same chunk of camera-size JPEGs in buckets of 768 x 768 (24 x 24 latents), the same plan, checksums compared in
both; rounds alternate in one process and the best CPU seconds of each count. Encoding goes through the command's own
code, with an encoder that averages blocks of pixels: a real one's time is the device's, not the loader's.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from scripts.bench.loader import make_bench_chunk
from scripts.bench.result import Bar, Result
from scripts.bench.scan import make_pictures
from training.chunk_data import ChunkData, ChunkSource, make_loader
from training.config import RunConfig
from training.latents.ahead import ahead_of
from training.latents.command import encode_latents
from training.plans import batch_plan, caption_settings, pixel_settings
from training.stage_c.latents import Latents

_DEMO = Path(__file__).parents[1] / "demo_pictures"
_NUM_PICTURES, _FULL_PICTURES = 4, 12
_ROUNDS, _FULL_ROUNDS = 2, 5


class _BlockMeans:
    """Stands for an encoder: 16 channels of means over 32 x 32 pixels."""

    def digests(self) -> dict[str, str]:
        return {"bench": "0" * 64}

    def encode(self, images: Tensor) -> Latents:
        return Latents(F.avg_pool2d(images.float() / 255, 32).repeat(1, 6, 1, 1)[:, :16])


def run(*, full: bool, data: Path | None) -> Result:
    """Measure and return the figures. full: 96 samples of 12 pictures instead of 32 of 4; more rounds."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pictures = make_pictures(folder, data or _DEMO, num_pictures=_FULL_PICTURES if full else _NUM_PICTURES)
        chunk, _, _ = make_bench_chunk(folder, pictures["baseline"])
        figures = _measure(folder, chunk, rounds=_FULL_ROUNDS if full else _ROUNDS)
    return Result(
        bench="latents",
        figures=figures,
        bars=[Bar("latents_over_pixels", at_least=10)],
        full_size=full,
        peer="our own loader from pixels",
        notes=[
            "CPU seconds of one process without workers: read, compare, decode or not, make batches and captions",
            "the files were just written: they come from the page cache, not from a disk",
        ],
    )


def _measure(folder: Path, chunk: Any, *, rounds: int) -> dict[str, float]:
    config = RunConfig.model_validate(
        {
            "name": "bench", "device": "cpu", "data": {"workspace": folder, "chunks": ["bench/*"], "workers": 0},
            "batch": {"batch_size": 16, "micro_batch_size": 4}, "latents": {"use": True},
            "stage_c": {"network": "none", "text_encoder": "none", "effnet": "none"},
        }
    )  # fmt: skip
    with (
        mock.patch("training.recipes.encoders.load_image_encoder", lambda *_: _BlockMeans()),
        mock.patch("training.latents.encode.load_image_encoder", lambda *_: _BlockMeans()),
    ):
        started = time.process_time()
        list(encode_latents(config))
        encode_seconds = time.process_time() - started
        index, pixels, captions = chunk.read_index(), pixel_settings(config), caption_settings(config)
        plan = batch_plan(index, chunk.name, config=config, epoch=0)
        ahead = ahead_of(index, [plan], config=config, pixels=pixels, captions=captions, from_main=lambda ask: ask())

    def load(**more: Any) -> list[Tensor | None]:
        data = ChunkData(
            ChunkSource.of_chunk(chunk), plan, rank=0, world_size=1, pixels=pixels, captions=captions, **more
        )
        return [batch.latents for batch in make_loader(data, workers=0)]

    calls: dict[str, Callable[[], Any]] = {"pixels": load, "latents": lambda: load(ahead=ahead)}
    best: dict[str, float] = {}
    torch.set_num_threads(1)
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.process_time()
            call()
            seconds = time.process_time() - started
            best[name] = min(best.get(name, seconds), seconds)
    num_bytes = sum(path.stat().st_size for path in (folder / "latents").rglob("part-*.bin"))
    return {
        "images": float(plan.num_images),
        "latents_over_pixels": best["pixels"] / best["latents"],
        "pixels_images_per_cpu_second": plan.num_images / best["pixels"],
        "latents_images_per_cpu_second": plan.num_images / best["latents"],
        "encode_ms_per_image": encode_seconds / plan.num_images * 1000,
        "kilobytes_per_latent": num_bytes / plan.num_images / 1000,
    }
