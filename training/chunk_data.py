"""Load the micro-batches that one rank runs: bytes by offset from the shards, pixels in the bucket's size, captions.

The order is the batch plan's; nothing is shuffled, discovered or dropped here. Starting at step k slices the plan and
reads nothing that belongs to earlier steps, so it costs the same for every k. What a batch holds does not depend on
rank, number of ranks, number of workers, or where the start was. Do not hand the loader to `accelerator.prepare`.
"""

import math
import multiprocessing
import os
import signal
import sys
import threading
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.context import BaseContext
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from sharding.chunk import Chunk, ChunkError, ShardReader, read_index
from sharding.images import ImageError, decode_rgb
from training.batch_plan import BatchPlan, PlannedSample, RankMicroBatch, rank_share
from training.buckets import Placement
from training.caption_text import CaptionSettings, training_caption
from training.randomness import SampleIdentity, uniform

MID_GREY = 128

_COLUMNS = ["key", "shard", "image_offset", "image_bytes", "width", "height", "caption", "groups", "dataset"]
_STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)

RESAMPLING = Image.Resampling.HAMMING
"""Filter of all resizing. Of Pillow's, the nearest to an exact area average (OpenCV's INTER_AREA) between 1/1.4 and
1/2.3 of the size, the range left after DCT scaling; Pillow's BOX picks whole pixels there and shifts lines."""


@dataclass(frozen=True)
class ChunkSource:
    """Where a chunk's samples lie. Small: this, not the index, goes to the workers; each reads the index once."""

    index_path: Path
    """The index, or a run's copy of it."""
    folder: Path
    """The chunk's folder: shards named in the index are relative to it, wherever the index lies."""
    index_sha256: str | None = None
    """Checked when given."""

    @classmethod
    def of_chunk(cls, chunk: Chunk, index_path: Path | None = None) -> "ChunkSource":
        """Return the source of a committed chunk, read through `index_path` when a run has its own copy."""
        return cls(index_path or chunk.index_path, chunk.folder, chunk.info.index_sha256)

    def read_index(self) -> pa.Table:
        """Read the index. Raises ChunkError when it is missing, damaged or another one."""
        return read_index(self.index_path, expected_sha256=self.index_sha256)

    def shard_path(self, shard: str) -> Path:
        """Return where a shard named in the index lies."""
        return Path(os.path.normpath(self.folder / PurePosixPath(shard)))


@dataclass(frozen=True)
class PixelSettings:
    """How pixels get into the bucket. Raises ValueError for numbers out of range."""

    crop: Literal["centre", "random"] = "centre"
    """Which part of a resized image that is larger than its bucket is used."""
    flip_fraction: float = 0.0
    """Probability of each showing to be mirrored left to right."""

    def __post_init__(self) -> None:
        if self.crop not in ("centre", "random"):
            raise ValueError(f"crop: must be centre or random, got {self.crop!r}")
        if not 0 <= self.flip_fraction <= 1:
            raise ValueError(f"flip_fraction: must be between 0 and 1, got {self.flip_fraction}")


@dataclass(frozen=True)
class Batch:
    """One micro-batch, ready for a model. B samples of one bucket, in the plan's order."""

    step: int
    """Number of the step in the plan."""
    number: int
    """Number of the micro-batch in the step; past its end for padding."""
    is_padding: bool
    """Real data run only to keep ranks in step: all loss weights are 0, `broken` is empty, count nothing of it."""
    images: torch.Tensor
    """(B, 3, H, W) uint8, sRGB."""
    captions: list[str]
    identities: list[SampleIdentity]
    loss_weights: torch.Tensor
    """(B,) float32; 0 for a broken sample and for padding."""
    is_broken: torch.Tensor
    """(B,) bool; such a slot holds mid-grey pixels."""
    broken: list[tuple[str, str]]
    """(key, reason) of the broken samples."""
    datasets: list[str]
    original_sizes: list[tuple[int, int]]
    """(width, height) as stored, before resizing."""
    crops: list[tuple[int, int]]
    """(left, top) of the crop, in pixels of the resized image."""


class ChunkData(Dataset[Batch]):
    """Map-style: item i is the i-th micro-batch that this rank runs, from `first_step` on.

    first_global_step: global step of the plan's step 0; the caption warm-up needs it.
    An image that cannot be read becomes a weight-0 slot, never an exception. Raises ChunkError when a shard that is
    still needed is missing or the index is another one than the plan's, ValueError for a first_step beyond the plan.
    """

    def __init__(
        self,
        source: ChunkSource,
        plan: BatchPlan,
        *,
        rank: int,
        world_size: int,
        first_step: int = 0,
        first_global_step: int = 0,
        captions: CaptionSettings | None = None,
        pixels: PixelSettings | None = None,
    ) -> None:
        if not 0 <= first_step <= len(plan.steps):
            raise ValueError(f"chunk {plan.chunk}: first_step must be 0 … {len(plan.steps)}, got {first_step}")
        self._source = source
        self._seed, self._epoch, self._chunk = plan.seed, plan.epoch, plan.chunk
        self._first_global_step = first_global_step
        self._captions = captions or CaptionSettings()
        self._pixels = pixels or PixelSettings()
        self._items: list[tuple[int, RankMicroBatch]] = [
            (step.number, share)
            for step in plan.steps[first_step:]
            for share in rank_share(step, rank=rank, world_size=world_size)
        ]
        self._index: pa.Table | None = None
        self._reader = ShardReader()
        self._check_shards()

    def __len__(self) -> int:
        return len(self._items)

    def __getstate__(self) -> dict[str, Any]:
        # Neither the index nor open files travel to a worker.
        return {**self.__dict__, "_index": None, "_reader": ShardReader()}

    def __getitem__(self, item: int) -> Batch:
        step, share = self._items[item]
        micro_batch = share.micro_batch
        size = len(micro_batch.samples)
        images = torch.empty((size, 3, micro_batch.bucket.height, micro_batch.bucket.width), dtype=torch.uint8)
        batch = Batch(
            step=step,
            number=share.number,
            is_padding=share.is_padding,
            images=images,
            captions=[],
            identities=[],
            loss_weights=torch.tensor([sample.loss_weight for sample in micro_batch.samples], dtype=torch.float32),
            is_broken=torch.zeros(size, dtype=torch.bool),
            broken=[],
            datasets=[],
            original_sizes=[],
            crops=[],
        )
        for slot, (sample, placed) in enumerate(zip(micro_batch.samples, micro_batch.placements, strict=True)):
            self._fill(batch, slot, sample, placed)
        if share.is_padding:
            batch.loss_weights.zero_()
            batch.broken.clear()
        return batch

    def close(self) -> None:
        """Close the files this process has open; the next item opens them again."""
        self._reader.close()

    def _fill(self, batch: Batch, slot: int, sample: PlannedSample, placed: Placement) -> None:
        row = self._row(sample)
        identity = sample.identity(seed=self._seed, epoch=self._epoch, chunk=self._chunk)
        left, top = crop_position(placed, crop=self._pixels.crop, identity=identity)
        is_flipped = self._pixels.flip_fraction > 0 and uniform(identity, "flip") < self._pixels.flip_fraction
        try:
            image = resized_image(self._read(row), row["width"], row["height"], placement=placed)
        except ImageError as error:
            batch.images[slot] = MID_GREY
            batch.loss_weights[slot] = 0
            batch.is_broken[slot] = True
            batch.broken.append((sample.key, str(error)))
        else:
            right, bottom = left + placed.bucket.width, top + placed.bucket.height
            pixels: npt.NDArray[np.uint8] = np.asarray(image)[top:bottom, left:right]
            if is_flipped:
                pixels = pixels[:, ::-1]
            batch.images[slot] = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        batch.captions.append(
            training_caption(
                row["caption"],
                row["groups"],
                settings=self._captions,
                identity=identity,
                global_step=self._first_global_step + batch.step,
            )
        )
        batch.identities.append(identity)
        batch.datasets.append(row["dataset"])
        batch.original_sizes.append((row["width"], row["height"]))
        batch.crops.append((left, top))

    def _table(self) -> pa.Table:
        if self._index is None:
            self._index = self._source.read_index().select(_COLUMNS)
        return self._index

    def _row(self, sample: PlannedSample) -> dict[str, Any]:
        rows: list[dict[str, Any]] = self._table().slice(sample.row, 1).to_pylist()
        if not rows or rows[0]["key"] != sample.key:
            raise ChunkError(
                f"{self._source.index_path}: row {sample.row} is not {sample.key}; the batch plan of chunk"
                f" {self._chunk} was made from another index"
            )
        return rows[0]

    def _read(self, row: dict[str, Any]) -> bytes:
        path = self._source.shard_path(row["shard"])
        try:
            return self._reader.read(path, row["image_offset"], row["image_bytes"])
        except ChunkError as error:
            if not path.exists():
                raise
            raise ImageError("short_read", str(error)) from error

    def _check_shards(self) -> None:
        rows = {sample.row for _, share in self._items for sample in share.micro_batch.samples}
        shards = self._table().column("shard").take(pa.array(sorted(rows), pa.int64())).unique().to_pylist()
        missing = [path for path in map(self._source.shard_path, sorted(shards)) if not path.is_file()]
        if missing:
            raise ChunkError(
                f"chunk {self._chunk}: {len(missing)} of {len(shards)} shards are missing, first {missing[0]};"
                " run `python -m sharding verify`"
            )


def crop_position(
    placement: Placement, *, crop: Literal["centre", "random"], identity: SampleIdentity
) -> tuple[int, int]:
    """Return (left, top) of the bucket in the resized image, in pixels."""
    spare_width = placement.resized_width - placement.bucket.width
    spare_height = placement.resized_height - placement.bucket.height
    if crop == "centre":
        return spare_width // 2, spare_height // 2
    across, down = identity.generator("crop").random(2)
    return int(across * (spare_width + 1)), int(down * (spare_height + 1))


def resized_image(data: bytes, width: int, height: int, *, placement: Placement) -> Image.Image:
    """Decode and resize to the placement's size, not yet cropped: RGB, upright.

    width, height: pixels that the index promises. A JPEG is decoded at the smallest DCT scale that still covers the
    resized size. Raises ImageError; `size_mismatch` when the image has another size than promised.
    """
    resized = (placement.resized_width, placement.resized_height)
    shorter, longer = min(width, height), max(width, height)
    # The second term: rounding may ask a pixel more of the longer side than the shorter side's scale gives.
    min_side = max(min(resized), math.ceil(max(resized) * shorter / longer))
    image = decode_rgb(data, min_side=min_side)
    scaled_sizes = {(-(-width // scale), -(-height // scale)) for scale in (1, 2, 4, 8)}
    if image.size not in scaled_sizes or (image.size != (width, height) and min(image.size) < min_side):
        raise ImageError("size_mismatch", f"decoded {image.width}x{image.height}, the index says {width}x{height}")
    return image if image.size == resized else image.resize(resized, RESAMPLING)


def make_loader(data: ChunkData, *, workers: int, prefetch: int = 2) -> DataLoader[Batch]:
    """Return a loader that gives the batches of `data` in order.

    workers: data processes; 0 loads in this process. prefetch: batches each worker keeps ready.

    Workers are forked from a server that has imported this module, not from this process: forking one with CUDA and
    threads can deadlock, and spawning each one costs 2.5 s of imports. The first loader of a process pays those once,
    in the background from this call on; later ones start in 0.05 s. SIGINT, SIGTERM and SIGUSR1/2, which Slurm
    sends to every process of a job, do not end them: the training process alone decides when to stop.
    """
    return DataLoader(
        data,
        batch_size=None,
        shuffle=False,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        persistent_workers=workers > 0,
        multiprocessing_context=_worker_context() if workers else None,
        worker_init_fn=start_worker,
        # Without a generator of its own the loader draws its base seed from torch's global one.
        generator=torch.Generator(),
    )


def start_worker(worker: int) -> None:
    """Prepare a worker process: one thread, deaf to stop signals that do not come from the training process."""
    torch.set_num_threads(1)
    for number in _STOP_SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_training_process, daemon=True).start()


def _end_with_the_training_process() -> None:
    """End this worker when its training process is gone or sends SIGTERM.

    torch's own watch looks at the fork server, which lives as long as its workers: after a kill -9 of the training
    process all would stay for ever. And were SIGTERM ignored altogether, a training process that exits would hang:
    it ends its workers with one and then waits for them.
    """
    training_process = multiprocessing.parent_process()
    assert training_process is not None
    while training_process.is_alive():
        received = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if received is not None and received.si_pid == training_process.pid:
            break
    os._exit(128 + signal.SIGTERM)


def _worker_context() -> BaseContext:
    if sys.platform == "win32":
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver

    forkserver.set_forkserver_preload([__name__])
    # The server inherits the blocked signals and so does every worker before `start_worker` runs: a signal to the
    # whole process group would otherwise end the server, and with it all workers. The tracker comes first because
    # starting it unblocks.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return multiprocessing.get_context("forkserver")
