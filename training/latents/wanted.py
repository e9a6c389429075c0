"""What has to be encoded of a chunk so that a run can train from it: pictures at their places, captions. No torch.

A pure function of the index and the run's plans. Wanted things are cut into parts of PART_SIZE, in the index's order,
so that a task reads the tars from front to back. The digest of the list names the folder that the parts lie in: other
pictures, sizes or flips are another folder, and nothing is ever overwritten by something else.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from sharding.files import digest_of
from training.batch_plan import BatchPlan, MicroBatch, PlannedSample
from training.buckets import Placement
from training.caption_text import CaptionSettings, training_caption
from training.randomness import SampleIdentity

PART_SIZE = 1_000
"""Pictures or captions: a few minutes' work, all that a kill costs."""


@dataclass(frozen=True)
class WantedPicture:
    """A picture of the index at one place in a bucket."""

    row: int
    key: str
    content: str
    """SHA-256 of its bytes and, where the mask decides the crop, of the shard that the mask is in."""
    placement: Placement

    def latent_id(self, *, is_flipped: bool) -> str:
        """Return the name of its latent."""
        return latent_id(self.key, self.placement, is_flipped=is_flipped)


@dataclass(frozen=True)
class Wanted:
    """The pictures of a chunk that are to be encoded. with_flips: each mirrored, too."""

    pictures: tuple[WantedPicture, ...]
    with_flips: bool

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the whole list and how it is cut."""
        names = [[one.latent_id(is_flipped=False), one.content] for one in self.pictures]
        return digest_of([PART_SIZE, self.with_flips, names])

    @property
    def num_parts(self) -> int:
        return num_parts(len(self.pictures))

    def part(self, number: int) -> tuple[WantedPicture, ...]:
        return self.pictures[number * PART_SIZE : (number + 1) * PART_SIZE]


@dataclass(frozen=True)
class WantedCaptions:
    """The different captions of a chunk, as they are trained, in the order of their first use."""

    captions: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the whole list and how it is cut."""
        return digest_of([PART_SIZE, *self.captions])

    @property
    def num_parts(self) -> int:
        return num_parts(len(self.captions))

    def part(self, number: int) -> tuple[str, ...]:
        return self.captions[number * PART_SIZE : (number + 1) * PART_SIZE]


def num_parts(num_things: int) -> int:
    """Return into how many parts so many things are cut."""
    return -(-num_things // PART_SIZE)


def latent_id(key: str, placement: Placement, *, is_flipped: bool) -> str:
    """Return the name of a latent: whose it is, and all that tells it from others of the same picture."""
    size = f"{placement.resized_width}x{placement.resized_height}"
    return f"{key} {size} {placement.bucket}{' flipped' * is_flipped}"


def caption_id(caption: str) -> str:
    """Return the name of a caption's text output."""
    return hashlib.sha256(caption.encode()).hexdigest()


def wanted_pictures(index: pa.Table, plans: Iterable[BatchPlan], *, with_flips: bool, with_masks: bool) -> Wanted:
    """Return the pictures that plans show, each at each of its places once, in the index's order.

    with_masks: a mask decides where its picture is cut.
    """
    names = ["sha256", "shard_sha256", "mask_bytes"]
    contents, shards, mask_bytes = (index.column(name).to_pylist() for name in names)

    def content(row: int) -> str:
        return f"{contents[row]} {shards[row]}" if with_masks and mask_bytes[row] else str(contents[row])

    found = {
        (sample.row, placed): sample.key
        for plan in plans
        for micro_batch in plan.micro_batches()
        for sample, placed in zip(micro_batch.samples, micro_batch.placements, strict=True)
    }
    order = sorted(found, key=lambda one: (one[0], one[1].bucket, one[1].resized_width, one[1].resized_height))
    pictures = (WantedPicture(row, found[row, placed], content(row), placed) for row, placed in order)
    return Wanted(tuple(pictures), with_flips)


def wanted_captions(index: pa.Table, plans: Sequence[BatchPlan], *, settings: CaptionSettings) -> WantedCaptions:
    """Return the captions that plans train. settings: such that a sample's caption never changes."""
    rows = sorted({sample.row for plan in plans for one in plan.micro_batches() for sample in one.samples})
    columns: list[dict[str, Any]] = (
        index.select(["key", "caption", "groups"]).take(pa.array(rows, pa.int64())).to_pylist()
    )
    captions = (
        training_caption(
            row["caption"],
            row["groups"],
            settings=settings,
            identity=SampleIdentity(0, 0, "", row["key"]),
            global_step=0,
        )
        for row in columns
    )
    return WantedCaptions(tuple(dict.fromkeys(captions)))


def in_batches(pictures: Sequence[WantedPicture], batch_size: int) -> Iterator[MicroBatch]:
    """Yield the pictures of a part as micro-batches of one bucket each, of about the same order."""
    waiting: dict[Any, list[WantedPicture]] = {}
    for picture in pictures:
        pool = waiting.setdefault(picture.placement.bucket, [])
        pool.append(picture)
        if len(pool) == batch_size:
            yield _micro_batch(waiting.pop(picture.placement.bucket))
    for pool in waiting.values():
        yield _micro_batch(pool)


def _micro_batch(pictures: Sequence[WantedPicture]) -> MicroBatch:
    samples = tuple(PlannedSample(one.row, one.key, "", 0, 1.0) for one in pictures)
    return MicroBatch(pictures[0].placement.bucket, samples, tuple(one.placement for one in pictures))
