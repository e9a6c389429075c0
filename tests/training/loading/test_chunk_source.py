import os

import pytest

from sharding.chunk import ChunkError
from tests.training.chunks import make_chunk, make_data, make_plan
from training.chunk_data import make_loader


@pytest.fixture
def chunk(tmp_path):
    return make_chunk(tmp_path / "newest" / "0000")


def flip_a_bit(chunk, row):
    path = chunk.shard_path(row["shard"])
    path.chmod(0o644)
    with path.open("r+b") as stream:
        stream.seek(row["image_offset"] + row["image_bytes"] // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))
    return path


def all_of(data):
    return [data[item] for item in range(len(data))]


def test_a_flipped_bit_is_an_error_that_names_shard_and_sample(chunk):
    row = chunk.read_index().to_pylist()[13]
    path = flip_a_bit(chunk, row)

    with pytest.raises(
        ChunkError, match=f"{path.name}: damaged: the image {row['key']} at byte {row['image_offset']:,}"
    ):
        all_of(make_data(chunk))


def test_samples_of_a_damaged_shard_are_not_checked_before_they_are_used(chunk):
    plan = make_plan(chunk)
    later = {sample.row for step in plan.steps[1:] for batch in step.micro_batches for sample in batch.samples}
    earlier = next(row for row in range(24) if row not in later)
    flip_a_bit(chunk, chunk.read_index().to_pylist()[earlier])

    assert len(all_of(make_data(chunk, plan, first_step=1))) == sum(len(step.micro_batches) for step in plan.steps[1:])


def test_without_checksums_a_flipped_bit_passes(chunk):
    flip_a_bit(chunk, chunk.read_index().to_pylist()[13])

    assert all_of(make_data(chunk, with_checksum=False))


@pytest.mark.parametrize("with_checksum", [True, False])
def test_a_tar_cut_short_while_it_is_trained_is_an_error_that_names_it(chunk, with_checksum):
    plan = make_plan(chunk)
    data = make_data(chunk, plan, with_checksum=with_checksum)
    path = chunk.shard_path(chunk.info.shards[1].path)
    os.truncate(path, path.stat().st_size // 2)

    with pytest.raises(ChunkError, match=rf"{path.name}: ends at byte [\d,]+, [\d,]+ are needed; damaged"):
        all_of(data)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_data_says_the_same_from_a_worker(chunk, workers):
    path = flip_a_bit(chunk, chunk.read_index().to_pylist()[13])

    with pytest.raises(ChunkError) as error:
        list(make_loader(make_data(chunk), workers=workers))

    assert str(error.value).startswith(str(path))
    assert "Traceback" not in str(error.value)


def test_a_disk_error_names_the_shard(chunk, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    data = make_data(chunk)
    monkeypatch.setattr(os, "pread", fail)

    with pytest.raises(ChunkError, match=r"shard-.*tar: cannot be read: .*Input/output error"):
        data[0]
