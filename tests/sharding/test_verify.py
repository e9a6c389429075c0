"""Damage of every kind is found and named; a sound workspace has no problems."""

import numpy as np
import pyarrow as pa
import pytest

from sharding.chunk import Sample, captions_digest, commit_chunk, open_chunk, write_shard
from sharding.combine import combine
from sharding.schema import RELATIVES, Workspace
from sharding.tables import part_name, write_part
from sharding.verify import verify


@pytest.fixture
def add(workspace, paint, encode):
    """Commit a chunk of three pictures; keywords replace fields of the first one's Sample or row."""

    def write(name="a/0000", *, first=0, row=None, shard_captions=None, **fields):
        dataset, samples = name.split("/")[0], []
        for number in range(first, first + 3):
            key = f"{number:016x}"
            values = {
                "key": key,
                "image_name": f"{key}.jpg",
                "image": encode(paint(number)),
                "facts": {"key": key, "caption": f"c {number}"},
                "caption": f"c {number}",
                "row": {"width": 96, "height": 72, "groups": [], "dataset": dataset, "period": "", "repeats": 1,
                        "loss_weight": 1.0},
            }  # fmt: skip
            if number == first:
                values |= fields
                values["row"] = values["row"] | (row or {})
            samples.append(Sample(**values))
        folder = workspace.chunks / name
        shard, rows = write_shard(folder, 0, samples)
        rows[0] |= row or {}
        texts = captions_digest([one.key for one in samples], [one.caption for one in samples])
        return commit_chunk(
            folder, rows, name=name, shards=[shard], policy="default", shard_policy="default", made_from="x", seed=0,
            shard_captions=texts if shard_captions is None else shard_captions,
        )  # fmt: skip

    return write


def problems(workspace: Workspace) -> str:
    return "\n".join(str(problem) for problem in verify(workspace))


def test_a_sound_workspace_has_no_problems(add, workspace, make_config):
    add()
    add("b/0000", first=10)
    combine(make_config(), workspace)

    assert verify(workspace) == []
    assert verify(workspace, chunk="b/0000") == []


def test_any_flipped_byte_of_a_shard_is_found(add, workspace):
    chunk = add()
    path = chunk.shard_path(chunk.info.shards[0].path)
    sound = path.read_bytes()

    for place in np.linspace(0, len(sound) - 1, 12).astype(int):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        assert "damaged: delete it and run `python -m sharding pack` again" in problems(workspace)
    path.write_bytes(sound[:-1])
    assert "bytes, expected" in problems(workspace)
    path.unlink()
    assert "missing; run `python -m sharding pack` again" in problems(workspace)


def test_a_damaged_index_and_a_damaged_chunk_json_are_found(add, workspace):
    chunk = add()
    sound = chunk.index_path.read_bytes()

    chunk.index_path.write_bytes(sound + b"x")
    assert "damaged: SHA-256" in problems(workspace)
    chunk.index_path.write_bytes(sound)
    (chunk.folder / "chunk.json").write_text("{")
    assert "not valid JSON" in problems(workspace)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"image": b"no picture"}, "does not decode: not_an_image"),
        ({"row": {"width": 95}}, "the picture is 96x72, the index says 95x72"),
        ({"row": {"sha256": "0" * 64}}, "the picture's SHA-256 is"),
        ({"facts": {"key": "0", "caption": ""}}, "KEY.json belongs to another key"),
        ({"facts": {"rating": None}}, "KEY.json holds a null"),
        ({"shard_captions": "0" * 64}, "the tars' captions are not those of policy default"),
        ({"row": {"caption": "other"}, "shard_captions": ""}, "is not the index's caption of policy default"),
        ({"row": {"image_offset": 0}}, "is not where the index says"),
    ],
)
def test_what_the_index_says_wrongly_is_found(add, workspace, change, expected):
    add(**change)

    assert expected in problems(workspace)


def test_a_key_in_two_plain_chunks_is_found(add, workspace):
    add("a/0000")
    add("b/0000", first=2)

    assert problems(workspace) == (
        "chunk b/0000: key 0000000000000002: stands in a/0000, too; pack both again after `plan`"
    )


def test_a_stale_combined_chunk_is_found(add, workspace, make_config):
    chunk = add()
    combine(make_config(), workspace)
    chunk.shard_path(chunk.info.shards[0].path).unlink()

    assert "combined/0000-0000: stale" in problems(workspace)


def test_a_combined_chunk_that_points_at_the_wrong_place_is_found(add, workspace, make_config):
    add()
    combine(make_config(), workspace)
    chunk = open_chunk(workspace.chunks / "combined/0000-0000")
    rows = chunk.read_index().to_pylist()
    rows[0]["image_offset"] += 512
    info = chunk.info
    commit_chunk(chunk.folder, rows, name=info.name, shards=info.shards, policy="default", shard_policy="default",
                 made_from="x", seed=0, is_combined=True)  # fmt: skip

    assert "image_offset differs from the sample it points at" in problems(workspace)


def test_a_renamed_chunk_folder_is_found(add, workspace):
    add().folder.rename(workspace.chunks / "a/0007")

    assert "chunk.json calls it a/0000; it was moved by hand" in problems(workspace)


def test_a_chunk_that_is_not_there_is_refused(add, workspace):
    add()

    with pytest.raises(FileNotFoundError, match="there are a/0000"):
        verify(workspace, chunk="a/0001")


def test_a_held_out_picture_or_a_relative_of_one_in_another_chunk_is_found(add, workspace):
    held = add("a/held-out")
    rows = held.read_index()
    commit_chunk(held.folder, rows, name="a/held-out", shards=held.info.shards, policy="default",
                 shard_policy="default", made_from="x", seed=0, is_held_out=True,
                 shard_captions=held.info.shard_captions)  # fmt: skip
    add("a/0000", first=2)
    add("b/0000", first=10)
    write_part(
        workspace.dedupe / "relatives" / part_name(0),
        pa.table([pa.array([5, 5], pa.int64()), pa.array([f"{1:016x}", f"{11:016x}"])], schema=RELATIVES),
        made_from="x",
    )

    found = problems(workspace).splitlines()

    assert found == [
        "chunk a/held-out: key 0000000000000002: stands in a/0000, too; pack both again after `plan`",
        "chunk b/0000: key 000000000000000b: has a relative that is held out in a/held-out; "
        "run `plan` and `pack` again",
    ]
    assert verify(workspace)[1].other == "a/held-out"


def test_a_combined_chunk_that_mixes_what_is_held_out_is_found(add, workspace, make_config):
    chunk = add()
    combine(make_config(), workspace)
    info = chunk.info
    commit_chunk(chunk.folder, chunk.read_index(), name=info.name, shards=info.shards, policy="default",
                 shard_policy="default", made_from="x", seed=0, is_held_out=True,
                 shard_captions=info.shard_captions)  # fmt: skip

    assert "chunk combined/0000-0000: key 0000000000000000: is held out in a/0000" in problems(workspace)
