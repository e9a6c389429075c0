import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sharding.chunk import ChunkError
from tests.training.chunks import SIZES, encode, make_chunk, make_data, make_plan, paint
from training.caption_text import CaptionSettings
from training.chunk_data import Batch, ChunkData, ChunkSource, PixelSettings, make_loader

VARIED = {
    "captions": CaptionSettings(shuffle=True, tag_dropout_fraction=0.2, token_warmup_steps=50),
    "pixels": PixelSettings(crop="random", flip_fraction=0.5),
}


def content(batch: Batch):
    """Everything in a batch but its place among the ranks, comparable."""
    return (
        batch.step, batch.number, batch.images.numpy().tobytes(), tuple(batch.images.shape),
        batch.captions, batch.identities, batch.loss_weights.tolist(), batch.is_broken.tolist(), batch.broken,
        batch.datasets, batch.original_sizes, batch.crops,
    )  # fmt: skip


@pytest.fixture(scope="module")
def chunk(tmp_path_factory):
    return make_chunk(tmp_path_factory.mktemp("chunks") / "newest" / "0000")


@pytest.fixture(scope="module")
def everything(chunk):
    data = make_data(chunk, **VARIED)
    return [data[item] for item in range(len(data))]


def test_a_batch_holds_pixels_captions_and_weights_of_its_samples(chunk):
    plan = make_plan(chunk)
    data = make_data(chunk, plan)

    for item, step in ((i, s) for i, s in enumerate(s for s in plan.steps for _ in s.micro_batches)):
        batch = data[item]
        micro_batch = step.micro_batches[batch.number]
        bucket, size = micro_batch.bucket, len(micro_batch.samples)

        assert (batch.step, batch.is_padding) == (step.number, False)
        assert batch.images.shape == (size, 3, bucket.height, bucket.width)
        assert batch.images.dtype == torch.uint8
        assert batch.loss_weights.dtype == torch.float32
        assert [identity.key for identity in batch.identities] == [sample.key for sample in micro_batch.samples]
        assert batch.loss_weights.tolist() == [0.5 + int(sample.key, 16) % 3 for sample in micro_batch.samples]
        assert batch.captions == [f"tag{int(sample.key, 16)}, b, c, d, e" for sample in micro_batch.samples]
        assert batch.datasets == [f"d{int(sample.key, 16) % 2}" for sample in micro_batch.samples]
        assert batch.original_sizes == [SIZES[int(sample.key, 16) % 4] for sample in micro_batch.samples]
        for slot, sample in enumerate(micro_batch.samples):
            width, height = batch.original_sizes[slot]
            left, top = batch.crops[slot]
            placed = micro_batch.placements[slot]
            expected = paint(int(sample.key, 16), width, height).resize((placed.resized_width, placed.resized_height))
            window = np.asarray(expected)[top : top + bucket.height, left : left + bucket.width].astype(float)
            difference = np.abs(batch.images[slot].permute(1, 2, 0).numpy() - window).mean()
            assert difference < 6


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_all_world_sizes_see_the_same_micro_batches(chunk, everything, world_size):
    shares = []
    for rank in range(world_size):
        data = make_data(chunk, rank=rank, world_size=world_size, **VARIED)
        shares.append([data[item] for item in range(len(data))])

    assert len({len(share) for share in shares}) == 1
    for batches in zip(*shares, strict=True):
        assert len({batch.step for batch in batches}) == 1  # ranks never fall out of step
    real = [content(batch) for share in shares for batch in share if not batch.is_padding]
    assert sorted(real, key=lambda c: c[:2]) == [content(batch) for batch in everything]


def test_padding_is_real_data_without_weight(chunk):
    data = make_data(chunk, rank=2, world_size=3)

    padding = [batch for batch in (data[item] for item in range(len(data))) if batch.is_padding]

    assert padding
    for batch in padding:
        assert batch.loss_weights.tolist() == [0.0] * len(batch.captions)
        assert batch.images.float().std() > 1
        assert batch.broken == []
        assert batch.number >= 4 or batch.step == data[len(data) - 1].step


def test_workers_give_the_same_batches_in_the_same_order(chunk, everything):
    before = torch.get_rng_state()

    for workers in (0, 2):
        loader = make_loader(make_data(chunk, **VARIED), workers=workers)
        assert [content(batch) for batch in loader] == [content(batch) for batch in everything]

    assert torch.equal(torch.get_rng_state(), before)


def test_starting_at_a_step_is_a_slice_of_the_full_run(chunk, everything):
    for first_step in (1, 3):
        data = make_data(chunk, first_step=first_step, **VARIED)

        expected = [content(batch) for batch in everything if batch.step >= first_step]
        assert [content(data[item]) for item in range(len(data))] == expected


def test_starting_late_reads_nothing_of_earlier_steps(tmp_path):
    chunk = make_chunk(tmp_path / "newest" / "0000")
    plan = make_plan(chunk)
    late = {s.key for step in plan.steps[3:] for m in step.micro_batches for s in m.samples}
    for row in chunk.read_index().to_pylist():
        if row["key"] not in late:
            path = chunk.shard_path(row["shard"])
            path.chmod(0o644)
            with path.open("r+b") as stream:
                stream.seek(row["image_offset"])
                stream.write(b"\0" * row["image_bytes"])

    data = make_data(chunk, plan, first_step=3)
    reads = []
    reader = data._bytes._reader
    read = reader.read
    reader.read = lambda path, offset, size: reads.append(offset) or read(path, offset, size)
    batches = [data[item] for item in range(len(data))]

    assert [batch.broken for batch in batches] == [[]] * len(batches)
    assert len(reads) == sum(step.num_images for step in plan.steps[3:])


def test_the_warm_up_goes_on_from_the_global_step(chunk):
    captions = CaptionSettings(token_warmup_steps=100)

    first = make_data(chunk, captions=captions)[0]
    later = make_data(chunk, captions=captions, first_global_step=75)[0]
    done = make_data(chunk, captions=captions, first_global_step=100)[0]

    assert {len(caption.split(", ")) for caption in first.captions} == {1}
    assert {len(caption.split(", ")) for caption in later.captions} == {4}
    assert {len(caption.split(", ")) for caption in done.captions} == {5}


def test_flips_mirror_the_picture_and_nothing_else(chunk):
    plain, flipped = (make_data(chunk, pixels=PixelSettings(flip_fraction=fraction))[0] for fraction in (0, 1))

    assert torch.equal(flipped.images, plain.images.flip(3))


def test_broken_samples_become_slots_without_weight(tmp_path):
    truncated = encode(paint(3, 240, 200))[:-300]
    chunk = make_chunk(
        tmp_path / "newest" / "0000",
        images={0: b"no picture", 3: truncated},
        index_size={6: (130, 80)},
    )

    data = make_data(chunk)
    batches = [data[item] for item in range(len(data))]

    reasons = {key: reason for batch in batches for key, reason in batch.broken}
    assert {int(key, 16): reason.partition(":")[0] for key, reason in reasons.items()} == {
        0: "not_an_image", 3: "undecodable", 6: "size_mismatch",
    }  # fmt: skip
    for batch in batches:
        for slot, identity in enumerate(batch.identities):
            is_broken = int(identity.key, 16) in (0, 3, 6)
            assert bool(batch.is_broken[slot]) == is_broken
            assert (batch.loss_weights[slot] == 0) == is_broken
            assert (batch.images[slot] == 128).all() == is_broken
        assert len(batch.captions) == len(batch.identities) == batch.images.shape[0]


def test_a_missing_shard_is_an_error_before_the_first_step(tmp_path):
    chunk = make_chunk(tmp_path / "newest" / "0000")
    plan = make_plan(chunk)
    data = make_data(chunk, plan)
    for shard in chunk.info.shards:
        chunk.shard_path(shard.path).unlink()

    with pytest.raises(ChunkError, match="3 of 3 shards are missing"):
        make_data(chunk, plan)
    with pytest.raises(ChunkError, match="the shard is missing"):
        data[0]


def test_an_index_copied_elsewhere_finds_its_shards(chunk, everything, tmp_path):
    copy = shutil.copy(chunk.index_path, tmp_path / "index.parquet")
    source = replace(ChunkSource.of_chunk(chunk), index_path=copy)

    data = ChunkData(source, make_plan(chunk), rank=0, world_size=1, **VARIED)

    assert [content(data[item]) for item in range(len(data))] == [content(batch) for batch in everything]


def test_a_plan_of_another_index_is_refused(chunk, tmp_path):
    other = make_chunk(tmp_path / "newest" / "0000", num_samples=3)

    with pytest.raises(ChunkError, match="made from another index"):
        ChunkData(ChunkSource.of_chunk(chunk), replace(make_plan(other), steps=_renamed(other)), rank=0, world_size=1)[
            0
        ]
    with pytest.raises(ChunkError, match="damaged"):
        ChunkData(replace(ChunkSource.of_chunk(chunk), index_sha256="0" * 64), make_plan(chunk), rank=0, world_size=1)


def _renamed(chunk):
    step = make_plan(chunk).steps[0]
    micro_batch = step.micro_batches[0]
    samples = tuple(replace(sample, key="f" * 16) for sample in micro_batch.samples)
    return (replace(step, micro_batches=(replace(micro_batch, samples=samples),)),)


def test_what_goes_to_a_worker_is_small_whatever_the_captions(chunk):
    data = make_data(chunk)
    data[0]

    num_images = sum(step.num_images for step in make_plan(chunk).steps)
    assert len(pickle.dumps(data)) < 2000 + 250 * num_images


def test_a_first_step_beyond_the_plan_is_refused_and_its_end_is_empty(chunk):
    num_steps = len(make_plan(chunk).steps)

    assert len(make_data(chunk, first_step=num_steps)) == 0
    with pytest.raises(ValueError, match="first_step must be"):
        make_data(chunk, first_step=num_steps + 1)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="the signals of Unix")
def test_stop_signals_do_not_end_workers_or_their_server(chunk, everything):
    from multiprocessing import forkserver

    forkserver._forkserver._stop()  # another test's, which was started without the loader's precautions
    loader = make_loader(make_data(chunk, **VARIED), workers=1)
    batches = iter(loader)
    first = next(batches)
    server = forkserver._forkserver._forkserver_pid
    workers = batches.worker_pids

    # From another process, as Slurm would: from this one SIGTERM means "end".
    for name in ("TERM", "USR1", "INT"):
        subprocess.run(["kill", f"-{name}", *map(str, [server, *workers])], check=True)
    rest = list(batches)

    assert [content(batch) for batch in [first, *rest]] == [content(batch) for batch in everything]
    del batches, loader


SCRIPT = """
import os, sys
from pathlib import Path
from training.batch_plan import make_batch_plan
from training.buckets import BucketSettings
from training.chunk_data import ChunkData, ChunkSource, make_loader
from sharding.chunk import open_chunk

if __name__ == "__main__":
    chunk = open_chunk(Path(sys.argv[1]))
    plan = make_batch_plan(chunk.read_index(), bucket_settings=BucketSettings(resolution_area=96 * 96, step=32),
                           micro_batch_size=1, micro_batches_per_step=4, seed=5, epoch=0, chunk="newest/0000")
    batches = iter(make_loader(ChunkData(ChunkSource.of_chunk(chunk), plan, rank=0, world_size=1), workers=2))
    next(batches)
    print(*batches.worker_pids, flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), 9)
    raise ValueError("stopped by an error while the loader is in use")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="the signals of Linux")
@pytest.mark.parametrize("end", ["killed", "failed"])
def test_workers_end_with_the_training_process_however_it_ends(chunk, tmp_path, end):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}

    with (tmp_path / "stdout").open("w") as stdout:
        subprocess.run(
            [sys.executable, str(script), str(chunk.folder), end],
            stdout=stdout, stderr=subprocess.DEVNULL, env=environment, cwd=root, timeout=240,
        )  # fmt: skip

    workers = [int(pid) for pid in (tmp_path / "stdout").read_text().split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_masks_come_with_their_samples_and_are_white_for_others(tmp_path):
    mask = paint(50, 240, 200).convert("L")
    chunk = make_chunk(
        tmp_path / "newest" / "0000",
        images={3: encode(mask.convert("RGB"), "PNG"), 7: encode(paint(7, 240, 200))[:-300]},
        masks={3: encode(mask, "PNG"), 7: encode(mask, "PNG"), 11: b"no png"},
    )

    data = make_data(chunk, **VARIED)
    batches = [data[item] for item in range(len(data))]

    reasons = {int(key, 16): reason.partition(":")[0] for batch in batches for key, reason in batch.broken}
    assert reasons == {7: "undecodable", 11: "bad_mask"}
    seen = 0
    for batch in batches:
        numbers = [int(identity.key, 16) for identity in batch.identities]
        assert (batch.masks is not None) == (3 in numbers)
        for slot, number in enumerate(numbers if batch.masks is not None else []):
            expected = batch.images[slot, :1] if number == 3 else torch.full_like(batch.images[slot, :1], 255)
            assert torch.equal(batch.masks[slot], expected)
            seen += number == 3
    assert seen == 2  # it is repeated
