"""Load the micro-batches that one rank runs: bytes by offset from the shards, pixels in the bucket's size, captions.

The order is the batch plan's; nothing is shuffled, discovered or dropped here. Starting at step k slices the plan and
reads nothing that belongs to earlier steps, so it costs the same for every k. What a batch holds does not depend on
rank, number of ranks, number of workers, or where the start was. Do not hand the loader to `accelerator.prepare`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.data import Dataset

from sharding.chunk import ChunkError
from sharding.images import ImageError
from training.batch_plan import BatchPlan, PlannedSample, RankMicroBatch, rank_share
from training.buckets import Placement
from training.caption_text import CaptionSettings, training_caption
from training.latents.stored import Ahead
from training.latents.wanted import caption_id
from training.loading.batch import Batch
from training.loading.chunk_source import ChunkSource, SampleBytes
from training.loading.pictures import (
    DecodedPictures,
    Picture,
    Pictures,
    StoredPictures,
    stacked_images,
    stacked_latents,
    stacked_masks,
)
from training.loading.pixels import PixelSettings
from training.loading.workers import make_loader
from training.randomness import SampleIdentity

__all__ = ["Batch", "ChunkData", "ChunkSource", "PixelSettings", "make_loader"]

_COLUMNS = [
    "key", "shard", "image_offset", "image_bytes", "mask_offset", "mask_bytes", "sha256", "width", "height", "caption",
    "groups", "dataset",
]  # fmt: skip


@dataclass(frozen=True)
class _Loaded:
    """One sample of a micro-batch; broken: why it cannot be used, or ""."""

    identity: SampleIdentity
    caption: str
    dataset: str
    size: tuple[int, int]
    picture: Picture
    text: Sequence[torch.Tensor]
    broken: str


@dataclass(frozen=True, slots=True)
class _Item:
    """One micro-batch. step: in its epoch's plan."""

    epoch: int
    step: int
    global_step: int
    share: RankMicroBatch


class ChunkData(Dataset[Batch]):
    """Map-style: item i is the i-th micro-batch that this rank runs, from `first_step` of `plan` on.

    later: plans of the epochs behind it, in order: the same workers go on with them. first_global_step: global step of
    the plan's step 0; the caption warm-up needs it. with_checksum: compare the
    SHA-256 of every image with the index. ahead: latents and text outputs to read instead of decoding and encoding.
    An image that cannot be read becomes a weight-0 slot, never an exception. Raises ChunkError when a shard is missing
    or damaged (cut short, other bytes) or the index is another one than the plan's, ValueError for a first_step beyond
    the plan.
    """

    def __init__(
        self,
        source: ChunkSource,
        plan: BatchPlan,
        *,
        rank: int,
        world_size: int,
        later: Sequence[BatchPlan] = (),
        first_step: int = 0,
        first_global_step: int = 0,
        captions: CaptionSettings | None = None,
        pixels: PixelSettings | None = None,
        with_checksum: bool = True,
        ahead: Ahead | None = None,
    ) -> None:
        if not 0 <= first_step <= len(plan.steps):
            raise ValueError(f"chunk {plan.chunk}: first_step must be 0 … {len(plan.steps)}, got {first_step}")
        self._source = source
        self._seed, self._chunk = plan.seed, plan.chunk
        self._captions = captions or CaptionSettings()
        self._pixels = pixels or PixelSettings()
        self._items: list[_Item] = []
        self.num_items: list[int] = []
        """Of each plan."""
        for one in (plan, *later):
            steps = one.steps[first_step if one is plan else 0 :]
            items = [
                _Item(one.epoch, step.number, first_global_step + step.number, share)
                for step in steps
                for share in rank_share(step, rank=rank, world_size=world_size)
            ]
            self._items += items
            self.num_items.append(len(items))
            first_global_step += len(one.steps)
        self._index: pa.Table | None = None
        self._bytes = SampleBytes(source, with_checksum=with_checksum)
        self._ahead = ahead or Ahead()
        self._pictures: Pictures = DecodedPictures(self._bytes, self._pixels)
        if self._ahead.latents is not None:
            self._pictures = StoredPictures(self._bytes, self._pixels, self._ahead.latents)
        self._require_shards()

    def __len__(self) -> int:
        return len(self._items)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_index": None}  # the index does not travel to a worker

    def __getitem__(self, item: int) -> Batch:
        wanted = self._items[item]
        share, micro_batch = wanted.share, wanted.share.micro_batch
        pairs = zip(micro_batch.samples, micro_batch.placements, strict=True)
        loaded = [self._load(sample, placed, wanted) for sample, placed in pairs]
        weights = [
            0.0 if share.is_padding or one.broken else sample.loss_weight
            for one, sample in zip(loaded, micro_batch.samples, strict=True)
        ]
        broken = [(one.identity.key, one.broken) for one in loaded if one.broken]
        pictures, bucket = [one.picture for one in loaded], micro_batch.bucket
        return Batch(
            step=wanted.step,
            number=share.number,
            is_padding=share.is_padding,
            images=stacked_images(pictures),
            latents=stacked_latents(pictures),
            text=tuple(map(torch.stack, zip(*(one.text for one in loaded), strict=True))) or None,
            captions=[one.caption for one in loaded],
            identities=[one.identity for one in loaded],
            loss_weights=torch.tensor(weights, dtype=torch.float32),
            is_broken=torch.tensor([bool(one.broken) for one in loaded]),
            broken=[] if share.is_padding else broken,
            datasets=[one.dataset for one in loaded],
            original_sizes=[one.size for one in loaded],
            crops=[(one.left, one.top) for one in pictures],
            masks=stacked_masks(pictures, height=bucket.height, width=bucket.width),
        )

    def close(self) -> None:
        """Close the files this process has open; the next item opens them again."""
        self._bytes.close()
        self._ahead.close()

    def _load(self, sample: PlannedSample, placed: Placement, wanted: _Item) -> _Loaded:
        row = self._row(sample)
        identity = sample.identity(seed=self._seed, epoch=wanted.epoch, chunk=self._chunk)
        broken = ""
        try:
            picture = self._pictures.load(row, placed, identity)
        except ImageError as error:
            picture, broken = self._pictures.stand_in(row, placed, identity), str(error)
        caption = training_caption(
            row["caption"],
            row["groups"],
            settings=self._captions,
            identity=identity,
            global_step=wanted.global_step,
        )
        text: Sequence[torch.Tensor] = ()
        if self._ahead.text is not None:
            place = self._ahead.text.place(caption_id(caption))
            text, broken = self._ahead.text.tensors(place), broken or place.reason
        size = (row["width"], row["height"])
        return _Loaded(identity, caption, row["dataset"], size, picture, text, broken)

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

    def _require_shards(self) -> None:
        rows = {sample.row for item in self._items for sample in item.share.micro_batch.samples}
        table = self._table().select(["shard", "mask_bytes"]).take(pa.array(sorted(rows), pa.int64()))
        if self._ahead.latents is not None:  # of shards, only masks are read
            has_mask = pc.greater(table.column("mask_bytes"), 0)
            table = table.filter(has_mask) if self._pixels.with_masks else table.slice(0, 0)
        try:
            self._source.require_shards(table.column("shard").unique().to_pylist())
        except ChunkError as error:
            raise ChunkError(f"chunk {self._chunk}: {error}") from None
