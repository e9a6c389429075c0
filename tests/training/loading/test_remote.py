import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from sharding.chunk import ChunkError, commit_chunk, list_chunks, load_chunk, open_chunk
from sharding.config import ConfigError
from sharding.files import temporary_name
from tests.training.chunks import make_chunk, make_data
from training.config.data import DataConfig
from training.errors import RemoteError
from training.exit_codes import FAILED, code_of, is_foreseen
from training.loading.remote import RemoteWorkspace, fetch_chunk, mirror_remote

GIGABYTE = 10**9


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A workspace of three chunks and one that is held out."""
    root = tmp_path_factory.mktemp("there")
    for number in range(3):
        make_chunk(root / "chunks" / "newest" / f"{number:04d}", num_samples=6 + number, shard_size=4)
    make_chunk(root / "chunks" / "newest" / "held-out", num_samples=2)
    for name in ("0000", "0001", "0002", "held-out"):  # make_chunk calls each one newest/0000
        path = root / "chunks" / "newest" / name / "chunk.json"
        facts = {"name": f"newest/{name}", "is_held_out": name == "held-out"}
        path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    return root


@pytest.fixture(params=["file", "memory"])
def url(request, packed):
    if request.param == "file":
        yield f"file://{packed}"
        return
    import fsspec

    files = fsspec.filesystem("memory")
    files.put(f"{packed}/", "/bucket/workspace/", recursive=True)
    yield "memory://bucket/workspace"
    files.rm("/bucket", recursive=True)


def settings(url, folder, **values):
    return DataConfig(workspace=folder, remote=url, chunks=("newest/*",), **values)


def shards_here(folder):
    return sorted(path.relative_to(folder / "chunks").as_posix() for path in folder.glob("chunks/*/*/*.tar"))


def wait_for_background():
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.daemon and "fetch_ahead" in thread.name:
            thread.join(20)


def test_a_mirror_lists_the_chunks_and_fetching_one_makes_it_whole(url, packed, tmp_path):
    data = settings(url, tmp_path / "here")

    mirror_remote(data)

    chunks = list_chunks(data.workspace / "chunks")
    assert [chunk.name for chunk in chunks] == ["newest/0000", "newest/0001", "newest/0002"]
    assert [chunk.read_index().num_rows for chunk in chunks] == [6, 7, 8]
    assert shards_here(data.workspace) == []

    fetch_chunk(data, chunks[2])

    assert len(shards_here(data.workspace)) == 2
    theirs = open_chunk(packed / "chunks" / "newest" / "0002")
    for shard in theirs.info.shards:
        assert chunks[2].shard_path(shard.path).read_bytes() == theirs.shard_path(shard.path).read_bytes()
    assert make_data(chunks[2])[0].broken == []


def test_the_next_chunk_follows_in_the_background(url, tmp_path):
    data = settings(url, tmp_path / "here")
    mirror_remote(data)

    fetch_chunk(data, list_chunks(data.workspace / "chunks")[0])
    wait_for_background()

    assert {name.rpartition("/")[0] for name in shards_here(data.workspace)} == {"newest/0000", "newest/0001"}


def test_shards_of_done_chunks_make_room(packed, tmp_path):
    remote = RemoteWorkspace(f"file://{packed}", tmp_path / "here", 0)
    remote.mirror(["newest/*"])
    chunks = list_chunks(tmp_path / "here" / "chunks")
    sizes = [sum(shard.num_bytes for shard in chunk.info.shards) for chunk in chunks]

    remote = RemoteWorkspace(remote.url, remote.folder, sizes[1] + sizes[2])
    remote.fetch(chunks[0])
    os.utime(chunks[0].shard_path(chunks[0].info.shards[0].path), (1, 1))
    remote.fetch(chunks[1], beside=[chunks[0]])
    remote.fetch(chunks[2], beside=[chunks[1]])

    assert {name.rpartition("/")[0] for name in shards_here(remote.folder)} == {"newest/0001", "newest/0002"}
    with pytest.raises(ConfigError, match=r"data.cache_gb: .* too little for newest/0002"):
        RemoteWorkspace(remote.url, remote.folder, sizes[2] - 1).fetch(chunks[2])


def test_room_is_made_of_nothing_that_is_needed_however_the_folder_is_written(packed, tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    remote = RemoteWorkspace(f"file://{packed}", Path("../deep/here"), GIGABYTE)
    remote.mirror(["newest/*"])
    chunk = list_chunks(remote.folder / "chunks")[0]
    remote.fetch(chunk)

    RemoteWorkspace(remote.url, remote.folder, sum(shard.num_bytes for shard in chunk.info.shards)).fetch(chunk)

    assert len(shards_here(remote.folder)) == len(chunk.info.shards)


def test_what_a_killed_launch_left_half_is_removed_once_it_is_old(packed, tmp_path):
    remote = RemoteWorkspace(f"file://{packed}", tmp_path / "here", GIGABYTE)
    remote.mirror(["newest/*"])
    chunk = list_chunks(remote.folder / "chunks")[0]
    old, new = (temporary_name(chunk.folder / "shard-00000.tar") for _ in range(2))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))

    remote.fetch(chunk)

    assert (old.exists(), new.exists()) == (False, True)


def test_a_combined_chunk_brings_the_shards_of_the_chunks_it_points_at(packed, tmp_path):
    there = shutil.copytree(packed, tmp_path / "there")
    plain = open_chunk(there / "chunks" / "newest" / "0001")
    rows = [row | {"shard": f"../../newest/0001/{row['shard']}"} for row in plain.read_index().to_pylist()]
    shards = [replace(shard, path=f"../../newest/0001/{shard.path}") for shard in plain.info.shards]
    commit_chunk(
        there / "chunks" / "combined" / "0000", rows, name="combined/0000", shards=shards, policy="p",
        shard_policy="p", made_from="", seed=0, is_combined=True,
    )  # fmt: skip
    data = DataConfig(workspace=tmp_path / "here", remote=f"file://{there}")

    mirror_remote(data)
    (chunk,) = list_chunks(data.workspace / "chunks")
    assert chunk.read_index().num_rows == 7  # not stale, though no shard is here
    fetch_chunk(data, chunk)

    assert {name.rpartition("/")[0] for name in shards_here(data.workspace)} == {"newest/0001"}
    assert make_data(chunk)[0].broken == []


def test_what_is_here_is_not_brought_again_and_what_is_new_is(packed, tmp_path, monkeypatch):
    there = shutil.copytree(packed, tmp_path / "there")
    remote = RemoteWorkspace(f"file://{there}", tmp_path / "here", GIGABYTE)
    copied = []
    copy = RemoteWorkspace._copy
    monkeypatch.setattr(RemoteWorkspace, "_copy", lambda *args: copied.append(args[1]) or copy(*args))

    for _ in range(2):
        remote.mirror(["newest/*"])
        remote.fetch(list_chunks(remote.folder / "chunks")[0])
    assert len(copied) == 3 + 2

    copied.clear()
    path = there / "chunks" / "newest" / "0000" / "chunk.json"
    path.write_text(path.read_text() + "\n")
    remote.mirror(["newest/*"])
    assert len(copied) == 1


def test_bytes_that_are_not_those_of_chunk_json_never_arrive(packed, tmp_path):
    there = shutil.copytree(packed, tmp_path / "there")
    remote = RemoteWorkspace(f"file://{there}", tmp_path / "here", GIGABYTE)
    remote.mirror(["newest/*"])
    chunk = list_chunks(remote.folder / "chunks")[0]
    shard = there / "chunks" / "newest" / "0000" / chunk.info.shards[0].path
    shard.chmod(0o644)
    content = shard.read_bytes()

    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ChunkError, match=rf"{shard.name}: damaged: SHA-256"):
        remote.fetch(chunk)
    shard.unlink()
    with pytest.raises(ChunkError, match=rf"{shard.name}: missing"):
        remote.fetch(chunk)

    assert shard.name not in {path.name for path in remote.folder.rglob("*")}


def test_a_shard_that_would_lie_outside_of_the_folder_is_refused(packed, tmp_path):
    remote = RemoteWorkspace(f"file://{packed}", tmp_path / "here", GIGABYTE)
    remote.mirror(["newest/*"])
    chunk = list_chunks(remote.folder / "chunks")[0]
    for path in ("../../../../outside.tar", "shard.txt"):
        bad = replace(chunk, info=replace(chunk.info, shards=(replace(chunk.info.shards[0], path=path),)))

        with pytest.raises(ChunkError, match="is no tar of this workspace"):
            remote.fetch(bad)


def test_a_workspace_of_ones_own_is_never_made_a_mirror(packed, tmp_path):
    own = shutil.copytree(packed, tmp_path / "own")

    with pytest.raises(ConfigError, match="is a workspace of its own"):
        RemoteWorkspace(f"file://{packed}", own, GIGABYTE).mirror(["newest/*"])
    RemoteWorkspace(f"file://{packed}", tmp_path / "here", GIGABYTE).mirror(["newest/*"])
    with pytest.raises(ConfigError, match="mirrors file://"):
        RemoteWorkspace("file:///elsewhere", tmp_path / "here", GIGABYTE).mirror(["newest/*"])


def test_an_address_that_cannot_be_read_is_told(tmp_path, monkeypatch, packed):
    with pytest.raises(ConfigError, match=r"data\.remote: nothing://x"):
        RemoteWorkspace("nothing://x", tmp_path / "here", 1).mirror(["newest/*"])

    def fail(*_, **__):
        raise ConnectionError("no route")

    remote = RemoteWorkspace(f"file://{packed}", tmp_path / "there", 1)
    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.glob", fail)
    with pytest.raises(RemoteError, match="cannot be read: no route; the last saved state is intact") as error:
        remote.mirror(["newest/*"])
    assert (code_of(error.value), is_foreseen(error.value)) == (FAILED, True)


def test_without_remote_nothing_is_touched(tmp_path):
    data = DataConfig(workspace=tmp_path)

    mirror_remote(data)

    assert list(tmp_path.iterdir()) == []


def test_the_held_out_chunk_comes_too_and_stays(url, tmp_path):
    data = settings(url, tmp_path / "here")
    mirror_remote(data, held_out="newest/held-out")
    first, second, held_out = (
        load_chunk(data.workspace / "chunks" / f"newest/{n}") for n in ("0000", "0001", "held-out")
    )

    fetch_chunk(data, first, held_out="newest/held-out")
    wait_for_background()
    os.utime(held_out.shard_path(held_out.info.shards[0].path), (1, 1))  # the oldest: the first to go
    size = sum(shard.num_bytes for chunk in (second, held_out) for shard in chunk.info.shards)
    RemoteWorkspace(url, data.workspace, size).fetch(second, beside=[second, held_out])

    assert {name.rpartition("/")[0] for name in shards_here(data.workspace)} == {"newest/0001", "newest/held-out"}
    assert make_data(held_out)[0].broken == []
    with pytest.raises(ConfigError, match=r"data.cache_gb: .* too little for newest/0001 beside newest/held-out"):
        RemoteWorkspace(url, data.workspace, size - 1).fetch(second, beside=[second, held_out])
