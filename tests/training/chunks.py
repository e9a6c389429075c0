"""Small chunks of painted pictures, with plan and loader."""

import io

import numpy as np
from PIL import Image

from sharding.chunk import Sample, commit_chunk, write_shard
from training.batch_plan import make_batch_plan
from training.buckets import BucketSettings
from training.chunk_data import ChunkData, ChunkSource

SMALL = BucketSettings(resolution_area=96 * 96, step=32)
SIZES = [(96, 96), (130, 80), (80, 130), (240, 200)]


def paint(seed, width, height):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def encode(image, image_format="JPEG"):
    buffer = io.BytesIO()
    image.save(buffer, image_format, quality=92)
    return buffer.getvalue()


def make_chunk(
    folder, num_samples=24, shard_size=10, images=None, index_size=None, masks=None, name="newest/0000", **facts
):
    """images, masks: {number: bytes}; index_size: {number: (width, height)} lies about a size."""
    samples = []
    for number in range(num_samples):
        width, height = SIZES[number % len(SIZES)]
        data = (images or {}).get(number) or encode(paint(number, width, height))
        width, height = (index_size or {}).get(number, (width, height))
        tags = [f"tag{number}", "b", "c", "d", "e"]
        row = {
            "width": width, "height": height, "groups": [{"group": "general", "tags": tags}], "period": "newest",
            "dataset": f"d{number % 2}", "repeats": 1 + number % 2, "loss_weight": 0.5 + number % 3,
        }  # fmt: skip
        key = f"{number:016x}"
        mask = (masks or {}).get(number, b"")
        samples.append(Sample(key, f"{key}.jpg", data, {"width": width}, ", ".join(tags), row, mask))
    shards, rows = [], []
    for number in range(0, num_samples, shard_size):
        shard, shard_rows = write_shard(folder, number // shard_size, samples[number : number + shard_size])
        shards.append(shard)
        rows += shard_rows
    return commit_chunk(
        folder, rows, name=name, shards=shards, policy="default", shard_policy="default", made_from="", seed=0, **facts
    )


def make_plan(chunk, **changes):
    values = {"micro_batch_size": 3, "micro_batches_per_step": 4, "seed": 5, "epoch": 0, "chunk": chunk.name}
    return make_batch_plan(chunk.read_index(), bucket_settings=SMALL, **values | changes)


def make_data(chunk, plan=None, **changes):
    values = {"rank": 0, "world_size": 1} | changes
    return ChunkData(ChunkSource.of_chunk(chunk), plan or make_plan(chunk), **values)
