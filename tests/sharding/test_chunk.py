"""The chunk format: written once, committed last, read by offset."""

import hashlib
import json
import os
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sharding.chunk import (
    ChunkError,
    Sample,
    ShardReader,
    captions_digest,
    commit_chunk,
    is_sealed,
    iterate_samples,
    list_chunks,
    open_chunk,
    read_index,
    remove_unnamed,
    seal,
    write_shard,
)  # fmt: skip

ROW = {"width": 8, "height": 6, "groups": [{"group": "g", "tags": ["a", "b"]}], "dataset": "d", "period": "newest",
       "repeats": 1, "loss_weight": 1.0}  # fmt: skip


def sample(number: int, **fields) -> Sample:
    key = fields.pop("key", f"{number:016x}")
    values = {
        "image": bytes([number]) * (number * 300),
        "facts": {"key": key, "名": "値"},
        "caption": f"caption {number} é",
    }
    return Sample(key=key, image_name=f"{key}.jpg", row=ROW, **values | fields)


def commit(folder, *, numbers=range(5), **fields):
    shard, rows = write_shard(folder, 0, map(sample, numbers))
    values = {"name": "d/0000", "shards": [shard], "policy": "p", "shard_policy": "p", "made_from": "m", "seed": 0}
    return commit_chunk(folder, rows, **values | fields)


def test_what_was_written_is_read_back_by_offset(tmp_path):
    chunk = commit(tmp_path / "d" / "0000")

    found = list(iterate_samples(open_chunk(chunk.folder)))

    assert [(key, image, facts, text) for key, image, facts, text in found] == [
        (one.key, one.image, one.facts, one.caption) for one in map(sample, range(5))
    ]
    assert chunk.read_index().column("groups")[0].as_py() == ROW["groups"]


def test_a_shard_is_an_ordinary_tar_with_adjacent_members_and_fixed_times(tmp_path):
    shard, _ = write_shard(tmp_path, 3, map(sample, range(3)))

    path = tmp_path / shard.path
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    assert [member.name.partition(".")[2] for member in members] == ["jpg", "json", "txt"] * 3
    assert {(member.mtime, member.uid, member.mode) for member in members} == {(0, 0, 0o444)}
    assert shard.path == f"shard-00003-{shard.sha256[:12]}.tar"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == shard.sha256
    assert path.stat().st_size == shard.num_bytes and shard.num_bytes % 10_240 == 0


def test_the_same_samples_give_the_same_bytes(tmp_path):
    commit(tmp_path / "one" / "0000")
    commit(tmp_path / "two" / "0000")

    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n / "0000").iterdir()} for n in ("one", "two"))
    assert one == two


def test_a_folder_without_chunk_json_is_no_chunk(tmp_path):
    write_shard(tmp_path / "d" / "0000", 0, map(sample, range(3)))

    assert list_chunks(tmp_path) == []
    with pytest.raises(ChunkError, match=r"chunk d/0000: no chunk\.json .* pack it first"):
        open_chunk(tmp_path / "d" / "0000")


def test_a_failed_shard_leaves_nothing(tmp_path):
    def broken():
        yield sample(1)
        raise RuntimeError("gone")

    with pytest.raises(RuntimeError):
        write_shard(tmp_path, 0, broken())

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["a.b", "a/b"])
def test_a_key_that_webdataset_would_cut_is_refused(tmp_path, key):
    with pytest.raises(ChunkError, match="dot or slash"):
        write_shard(tmp_path, 0, [sample(1, key=key)])


def test_a_key_stands_only_once(tmp_path):
    with pytest.raises(ChunkError, match="comes twice"):
        write_shard(tmp_path, 0, [sample(1), sample(1)])
    shard, rows = write_shard(tmp_path, 0, [sample(1)])
    with pytest.raises(ChunkError, match="stands twice"):
        commit_chunk(tmp_path, [*rows, *rows], name="d/0", shards=[shard], policy="", shard_policy="", made_from="",
                     seed=0)  # fmt: skip


def test_facts_with_nan_are_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_shard(tmp_path, 0, [sample(1, facts={"score": float("nan")})])


def test_the_digest_changes_with_a_caption_or_the_order(tmp_path):
    chunk = commit(tmp_path / "d" / "0000")
    index = chunk.read_index()
    shared = {"name": "d/0000", "shards": chunk.info.shards, "policy": "p", "shard_policy": "p", "made_from": "m"}

    turned = commit_chunk(chunk.folder, index.take([1, 0, 2, 3, 4]), seed=0, **shared)
    captions = pa.array(["new", *index.column("caption").to_pylist()[1:]])
    place = index.schema.get_field_index("caption")
    recaptioned = commit_chunk(chunk.folder, index.set_column(place, "caption", captions), seed=0, **shared)

    assert len({chunk.info.digest, turned.info.digest, recaptioned.info.digest}) == 3


def test_unnamed_files_are_removed_but_seals_and_hidden_files_stay(tmp_path):
    chunk = commit(tmp_path / "d" / "0000")
    for name in ("shard-00000-0ld.tar", "index-0ld.parquet", "shard-1.tar.partial-999999999", ".checked"):
        (chunk.folder / name).touch()
    seal(chunk, "run-1")

    assert len(remove_unnamed(chunk)) == 3

    assert is_sealed(chunk.folder)
    assert (chunk.folder / ".checked").exists()
    assert len(list(iterate_samples(chunk))) == 5


def test_a_short_read_and_a_missing_shard_are_named(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"12345")
    reader = ShardReader()

    assert reader.read(tmp_path / "x.tar", 1, 3) == b"234"
    with pytest.raises(ChunkError, match="ends at byte 5, 9 are needed"):
        reader.read(tmp_path / "x.tar", 0, 9)
    with pytest.raises(ChunkError, match="the shard is missing"):
        reader.read(tmp_path / "y.tar", 0, 1)
    reader.close()


def test_an_index_of_another_schema_is_refused(tmp_path):
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "i.parquet")

    with pytest.raises(ChunkError, match="not an index of this version: columns shard"):
        read_index(tmp_path / "i.parquet")
    with pytest.raises(ChunkError, match="damaged"):
        read_index(tmp_path / "i.parquet", expected_sha256="0" * 64)
    with pytest.raises(ChunkError, match="missing"):
        read_index(tmp_path / "j.parquet")


def test_a_chunk_of_another_schema_version_is_refused(tmp_path):
    chunk = commit(tmp_path / "d" / "0000")
    path = chunk.folder / "chunk.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))

    with pytest.raises(ChunkError, match="schema version 99"):
        open_chunk(chunk.folder)


def test_sealing_a_combined_chunk_seals_what_it_points_at(tmp_path):
    plain = commit(tmp_path / "d" / "0000")
    shard = plain.info.shards[0]
    rows = [row | {"shard": f"../../d/0000/{row['shard']}"} for row in plain.read_index().to_pylist()]
    pointing = type(shard)(f"../../d/0000/{shard.path}", shard.sha256, shard.num_bytes, shard.num_samples)
    combined = commit_chunk(tmp_path / "c" / "0", rows, name="c/0", shards=[pointing], policy="p", shard_policy="p",
                            made_from="m", seed=0, is_combined=True)  # fmt: skip

    seal(combined, "r")

    assert is_sealed(plain.folder) and is_sealed(combined.folder)
    assert list(iterate_samples(combined)) == list(iterate_samples(plain))
    os.truncate(plain.shard_path(shard.path), 100)
    with pytest.raises(ChunkError, match="stale"):
        open_chunk(combined.folder)


def test_the_captions_digest_depends_on_keys_captions_and_order():
    digests = {
        captions_digest(keys, texts)
        for keys, texts in (
            (["a", "b"], ["x", "y"]),
            (["b", "a"], ["y", "x"]),
            (["a", "b"], ["x", "z"]),
            (["a"], ["x"]),
        )
    }

    assert len(digests) == 4


def test_columns_of_concepts_stay_in_the_index_and_have_their_types(tmp_path):
    folder = tmp_path / "concepts" / "01-all"
    index = commit(tmp_path / "d" / "0000").read_index()
    of_concepts = {"concept": ["cat"] * 5, "every_epochs": [2] * 5, "epoch_offset": [1] * 5, "note": ["x"] * 5}
    values = {"name": "concepts/01-all", "shards": [], "policy": "p", "shard_policy": "p", "made_from": "m", "seed": 0}

    chunk = commit_chunk(
        folder, pa.table({**dict(zip(index.column_names, index.columns, strict=True)), **of_concepts}), **values
    )
    read = chunk.read_index()
    damaged = read.set_column(read.column_names.index("every_epochs"), "every_epochs", pa.array(["2"] * 5))
    pq.write_table(damaged, tmp_path / "damaged.parquet")

    assert read.column_names == [*index.column_names, "concept", "every_epochs", "epoch_offset"]
    assert read.schema.field("every_epochs").type == pa.int32() and read["epoch_offset"].to_pylist() == [1] * 5
    with pytest.raises(ChunkError, match="column every_epochs is string, expected int32"):
        read_index(tmp_path / "damaged.parquet")
