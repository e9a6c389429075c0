"""Everything known about a picture, by its key or its path."""

import pyarrow as pa
import pytest

from sharding.chunk import Sample, commit_chunk, open_chunk, seal, write_shard
from sharding.schema import (
    CAPTIONS,
    DECISIONS,
    DROPS,
    GROUPS,
    LABELS,
    LISTING,
    MANIFEST,
    PAIRS,
    PLAN,
    SCORES,
    TAGGER,
    Workspace,
)
from sharding.show import render_keys, show
from sharding.tables import write_part

KEY, OTHER = "ab" * 8, "ac" * 8


def write(folder, rows, schema, name="part-00000.parquet"):
    rows = [dict.fromkeys(schema.names) | row for row in rows]
    write_part(folder / name, pa.Table.from_pylist(rows, schema=schema), made_from="x")


@pytest.fixture
def config(make_config):
    return make_config()


@pytest.fixture
def filled(workspace) -> Workspace:
    rows = [
        {"key": key, "source": "photos", "path": f"x/{key}.jpg", "status": "kept", "phash": b"\1\2"}
        for key in (KEY, OTHER)
    ]
    broken = {"key": "", "source": "photos", "path": "x/broken.jpg", "status": "unreadable", "detail": "no permission"}
    names = [row["path"] for row in (*rows, broken)] + ["x/later.jpg"]
    write(workspace.listing, [{"source": "photos", "path": name} for name in names], LISTING)
    write(workspace.manifest, [*rows, broken], MANIFEST)
    write(workspace.kept, rows[:1], MANIFEST)
    drop = {"key": OTHER, "source": "s", "path": "o.jpg", "stage": "dedupe", "reason": "near_duplicate",
            "kept_key": KEY, "distance": 3}  # fmt: skip
    write(workspace.dedupe / "drops", [drop], DROPS)
    tagger = workspace.annotations("wd")
    write(tagger, [{"key": KEY, "tag_ids": [1, 2], "tag_probs": [0.25, 0.75], "status": "ok"}], TAGGER)
    write(tagger, [{"tag_id": 1, "name": "sky"}, {"tag_id": 2, "name": "solo"}], LABELS, "labels.parquet")
    write(workspace.annotations("aes"), [{"key": KEY, "score": 0.5, "status": "ok"}], SCORES)
    write(workspace.captions("p"), [{"key": KEY, "text": "a caption", "groups": []}], CAPTIONS)
    write(workspace.plan, [{"key": KEY, "dataset": "d", "chunk": 3, "position": 7}], PLAN)
    return workspace


def test_a_planned_key_is_shown_with_all_its_tables(config, filled):
    [facts] = show(config, filled, KEY)

    assert [row.table for row in facts.rows] == [
        "manifest", "dedupe/kept", "annotations/aes", "annotations/wd", "captions/p", "plan",
    ]  # fmt: skip
    assert facts.fate == "planned, not packed yet"
    text = render_keys([facts])
    assert "tags: solo: 0.7500; sky: 0.2500" in text
    assert "text: a caption" in text and "phash: 0102" in text


def test_a_dropped_key_says_why(config, filled):
    [facts] = show(config, filled, OTHER[:5])

    assert facts.fate == f"dropped by dedupe: near_duplicate of {KEY} at distance 3 (s/o.jpg)"


def test_a_prefix_shows_every_key_that_begins_with_it(config, filled):
    assert [facts.key for facts in show(config, filled, "A")] == [KEY, OTHER]


def test_group_decision_and_neighbours_are_told(config, filled):
    members = [{"group": 5, "key": KEY, "is_keeper": True, "distance": 0, "rule": "pixels"},
               {"group": 5, "key": OTHER, "is_keeper": False, "distance": 3, "rule": "pixels"}]  # fmt: skip
    write(filled.dedupe / "groups", members, GROUPS)
    pair = {"left": int(KEY, 16), "right": int(OTHER, 16), "distance": 3, "kind": "near"}
    write(filled.dedupe / "pairs", [pair, pair | {"right": 2**64 - 1, "distance": None, "kind": "crop"}], PAIRS)
    write(filled.decisions, [{"key": KEY, "decision": "keep", "who": "ann", "why": "nice"}], DECISIONS)

    [facts] = show(config, filled, KEY)

    assert facts.fate == "planned, not packed yet; decided: keep by ann"
    text = render_keys([facts])
    assert f"others: {OTHER} (3 bits)" in text and "why: nice" in text
    assert f"near: {OTHER} (near, 3 bits), {'f' * 16} (crop, part of it)" in text


def test_places_in_chunks_are_told_with_mask_and_runs(config, filled):
    for name, mask in (("photos/0003", b""), ("photos/held-out", b"mask")):
        folder = filled.chunks / name
        row = {"width": 8, "height": 8, "groups": [{"group": "rest", "tags": ["sky"]}]}
        shard, rows = write_shard(folder, 0, [Sample(KEY, f"{KEY}.jpg", b"x", {}, "c", row, mask)])
        commit_chunk(folder, rows, name=name, shards=[shard], policy="p", shard_policy="p", made_from="m", seed=0,
                     is_held_out=name.endswith("held-out"))  # fmt: skip
    seal(open_chunk(filled.chunks / "photos" / "0003"), "run-7")

    [facts] = show(config, filled, KEY)

    assert facts.fate == "packed in photos/0003, photos/held-out"
    [first, held_out] = [row.values for row in facts.rows if row.table == "chunks"]
    assert first["trained_by"] == ["run-7"] and "mask_bytes" not in first and not first["is_held_out"]
    assert held_out["is_held_out"] and held_out["mask_bytes"] == 4
    assert held_out["shard"].endswith(".tar") and held_out["image_offset"] > 0
    assert held_out["groups"] == {"rest": ["sky"]}


def test_a_file_is_found_by_any_of_its_paths(config, filled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in (f"x/{KEY}.jpg", f"photos/x/{KEY}.jpg", f"raw/x/{KEY}.jpg", str(tmp_path / f"raw/x/../x/{KEY}.jpg")):
        assert [facts.key for facts in show(config, filled, text)] == [KEY]


def test_files_without_a_key_are_explained_too(config, filled):
    [broken] = show(config, filled, "x/broken.jpg")
    [later] = show(config, filled, "x/later.jpg")

    assert broken.fate == "dropped by scan: unreadable" and "no permission" in render_keys([broken])
    assert later.fate == "listed, not scanned yet"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ff", f"no key starts with 'ff'.*nearest are {OTHER}"),
        ("abac", f"nearest are {KEY} and {OTHER}"),
        ("x'; drop", "no such file"),
        ("x/brokn.jpg", "the nearest: photos/x/broken.jpg"),
        ("", "give a key"),
    ],
)
def test_what_is_not_there_is_refused_with_the_nearest(config, filled, text, message):
    with pytest.raises(ValueError, match=message):
        show(config, filled, text)


def test_an_empty_workspace_and_too_many_keys_are_refused(config, workspace):
    with pytest.raises(ValueError, match="nothing has been scanned"):
        show(config, workspace, "ab")
    with pytest.raises(ValueError, match="nothing is listed"):
        show(config, workspace, "a.jpg")
    write(workspace.manifest, [{"key": f"a{number:015x}", "status": "kept"} for number in range(21)], MANIFEST)
    with pytest.raises(ValueError, match="21 keys start with 'a', for example a000000000000000, a"):
        show(config, workspace, "a")
