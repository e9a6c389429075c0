"""Damage is undone with the same bytes where that is possible, and nothing else is touched."""

import hashlib
import shutil

import pyarrow as pa
import pytest
from PIL import Image

from sharding.chunk import list_chunks, open_chunk, seal
from sharding.combine import combine
from sharding.config import DatasetConfig, parse_config
from sharding.dedupe import dedupe
from sharding.pack import pack
from sharding.plan import make_plan
from sharding.repair import repair
from sharding.scan import scan
from sharding.schema import CAPTIONS, Workspace
from sharding.tables import part_name, read_parts, write_part
from sharding.verify import verify


def caption(workspace, words="solo"):
    keys = read_parts(workspace.kept, ["key"]).column("key").to_pylist()
    rows = [{"key": key, "text": f"{words} {key}", "groups": []} for key in keys]
    write_part(
        workspace.captions("default") / part_name(0), pa.Table.from_pylist(rows, schema=CAPTIONS), made_from=words
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    raw = tmp_path_factory.mktemp("raw")
    for number in range(14):
        Image.effect_noise((48, 40), 90).convert("RGB").save(raw / f"{number}.jpg")
    values = {
        "name": "test", "sources": {"photos": {"root": str(raw)}}, "filters": {"min_pixels": 1},
        "dedupe": {"radius": 0, "max_diameter": 0}, "pack": {"shard_size": 2}, "combine": {"chunk_size": 4},
        "plan": {"chunk_size": 6, "held_out": 2, "held_out_max_fraction": 0.2},
    }  # fmt: skip
    return parse_config(values, DatasetConfig, name="test.toml")


@pytest.fixture(scope="module", params=[False, True], ids=["virtual", "materialized"])
def built(config, tmp_path_factory, request):
    """A packed and combined workspace, which tests copy."""
    workspace = Workspace(tmp_path_factory.mktemp("built") / "workspace")
    scan(config, workspace, workers=0)
    dedupe(config, workspace)
    caption(workspace)
    make_plan(config, workspace)
    pack(config, workspace)
    combine(config, workspace, materialize=request.param)
    assert verify(workspace) == []
    return workspace


@pytest.fixture
def whole(built, workspace):
    """Return path → (digest, time) of the copy of a packed and combined workspace."""
    shutil.copytree(built.root, workspace.root)
    return contents(workspace)


def contents(workspace):
    files = (path for path in workspace.chunks.rglob("*") if path.is_file() and path.name != ".checked")
    return {path: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in sorted(files)}


def digests(found):
    return {path: digest for path, (digest, _) in found.items()}


def flip_a_byte(path):
    data = path.read_bytes()
    path.write_bytes(data[:700] + bytes([data[700] ^ 1]) + data[701:])


@pytest.mark.parametrize(
    ("kind", "damage", "is_sealed"),
    [
        ("shard-00001", "flip", False),
        ("shard-00001", "cut", True),
        ("shard-00001", "delete", True),
        ("index", "flip", True),
        ("index", "delete", False),
    ],
)
def test_only_the_damaged_file_is_made_again_with_the_same_bytes(config, workspace, whole, kind, damage, is_sealed):
    victim = next(path for path in whole if path.parent.name == "0000" and path.name.startswith(kind))
    if is_sealed:
        (victim.parent / "trained-by-r1").touch()
        whole[victim.parent / "trained-by-r1"] = contents(workspace)[victim.parent / "trained-by-r1"]
    if damage == "flip":
        flip_a_byte(victim)
    elif damage == "cut":
        victim.write_bytes(victim.read_bytes()[:-1])
    else:
        victim.unlink()

    report = repair(config, workspace, verify(workspace))

    assert report.left == ()
    after = contents(workspace)
    assert digests(after) == digests(whole)
    untouched = {path for path in whole if path.name.startswith("shard") and path != victim}
    if not any(path.parent.parent.name == "combined" for path in untouched):
        assert all(after[path] == whole[path] for path in untouched)


def test_a_damaged_combined_chunk_is_mixed_again_even_when_it_is_sealed(config, workspace, whole):
    chunk = open_chunk(workspace.chunks / "combined" / "0000-0000")
    seal(chunk, "r1")
    before = digests(contents(workspace))
    flip_a_byte(chunk.index_path)

    report = repair(config, workspace, verify(workspace))

    assert report.left == ()
    assert report.restored == (f"combined/0000-0000/{chunk.info.index}",)
    assert digests(contents(workspace)) == before


def test_a_lost_chunk_json_is_written_again(config, workspace, whole):
    (workspace.chunks / "photos" / "0001" / "chunk.json").write_text("{")

    report = repair(config, workspace, verify(workspace))

    assert report.packed_anew == ("photos/0001",)
    assert digests(contents(workspace)) == digests(whole)


def test_when_captions_have_changed_the_chunk_is_packed_anew(config, workspace, whole):
    chunk = open_chunk(workspace.chunks / "photos" / "0000")
    chunk.shard_path(chunk.info.shards[0].path).unlink()
    caption(workspace, "new")

    report = repair(config, workspace, verify(workspace))

    assert report.packed_anew == ("photos/0000",)
    again = open_chunk(chunk.folder)
    assert again.read_index().column("caption")[0].as_py().startswith("new ")
    assert [problem for problem in verify(workspace) if problem.chunk == "photos/0000"] == []


# --- held out ---


def test_what_is_held_out_is_packed_apart_and_mixed_nowhere(config, workspace, whole):
    chunk = open_chunk(workspace.chunks / "photos" / "held-out")
    keys = set(chunk.read_index().column("key").to_pylist())

    assert chunk.info.is_held_out and len(keys) == 2
    assert "photos/held-out" not in [one.name for one in list_chunks(workspace.chunks)]
    assert "photos/held-out" in [one.name for one in list_chunks(workspace.chunks, with_held_out=True)]
    for one in list_chunks(workspace.chunks):
        assert keys.isdisjoint(one.read_index().column("key").to_pylist())
    (workspace.plan / part_name(0)).unlink()
    make_plan(config, workspace)
    assert pack(config, workspace).sealed == ()
    assert set(open_chunk(chunk.folder).read_index().column("key").to_pylist()) == keys  # a lost plan changes nothing
