"""Everything known about a key."""

import pyarrow as pa
import pytest

from sharding.schema import CAPTIONS, DROPS, LABELS, MANIFEST, PLAN, SCORES, TAGGER, Workspace
from sharding.show import render_keys, show
from sharding.tables import write_part

KEY, OTHER = "ab" * 8, "ac" * 8


def write(folder, rows, schema, name="part-00000.parquet"):
    rows = [dict.fromkeys(schema.names) | row for row in rows]
    write_part(folder / name, pa.Table.from_pylist(rows, schema=schema), made_from="x")


@pytest.fixture
def filled(workspace) -> Workspace:
    rows = [
        {"key": key, "source": "s", "path": f"{key}.jpg", "status": "kept", "phash": b"\1\2"} for key in (KEY, OTHER)
    ]
    write(workspace.manifest, rows, MANIFEST)
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


def test_a_planned_key_is_shown_with_all_its_tables(filled):
    [facts] = show(filled, KEY)

    assert [row.table for row in facts.rows] == [
        "manifest", "dedupe/kept", "annotations/aes", "annotations/wd", "captions/p", "plan",
    ]  # fmt: skip
    assert facts.fate == "planned, not packed yet"
    text = render_keys([facts])
    assert "tags: solo: 0.7500; sky: 0.2500" in text
    assert "text: a caption" in text and "phash: 0102" in text


def test_a_dropped_key_says_why(filled):
    [facts] = show(filled, OTHER[:5])

    assert facts.fate == f"dropped by dedupe: near_duplicate of {KEY} at distance 3 (s/o.jpg)"


def test_a_prefix_shows_every_key_that_begins_with_it(filled):
    assert [facts.key for facts in show(filled, "A")] == [KEY, OTHER]


@pytest.mark.parametrize(
    ("prefix", "message"), [("ff", "no key starts with 'ff'"), ("x'", "digits 0-9 a-f"), ("", "digits")]
)
def test_what_is_no_key_is_refused(filled, prefix, message):
    with pytest.raises(ValueError, match=message):
        show(filled, prefix)
