from dataclasses import replace

import pytest

from sharding.chunk import ChunkError
from training.campaign import (
    StatusRow,
    campaign_chunks,
    chunk_rows,
    image_rows,
    next_chunk,
    render_rows,
    require_parent_done,
)
from training.ledger import ChunkRecord

CARD = {
    "newest": 228, "recent": 169, "mid": 121, "early": 67, "oldest": 17, "pixiv": 39, "visual novel cg": 25,
    "anime wallpaper": 10,
}  # fmt: skip


def record(chunk, status="done"):
    return ChunkRecord(
        chunk=chunk, position_in_run=0, status=status, epochs=1, steps=1, images_planned=1, images_trained=1, skipped=0,
        broken=0, chunk_digest="", plan_digests=(), last_state=None, seconds=0.0, devices=(), parent=None,
        start_global_step=0, applied_updates=1,
    )  # fmt: skip


def test_the_card_of_the_seed_adds_up():
    names = [f"{dataset}/{number:04d}" for dataset, remaining in CARD.items() for number in range(4 + remaining)]
    records = {name: record(name) for name in names if int(name[-4:]) < 4}

    rows = chunk_rows(names, records)
    table = render_rows("dataset name", "chunks", rows).splitlines()

    assert rows == [StatusRow(dataset, 4, remaining) for dataset, remaining in CARD.items()]
    assert table[0].split("|")[1:4] == [" dataset name    ", " training done ", " remaining "]
    assert table[-2].replace(" ", "") == "|**Total**|32|676|"
    assert table[-1] == "(chunks; 32 + 676 = 708)"
    assert len({len(line) for line in table[:-1]}) == 1


def test_a_chunk_under_way_or_superseded_is_not_done():
    records = {
        "a/0000": record("a/0000"),
        "a/0001": record("a/0001", "running"),
        "a/0002": record("a/0002", "superseded"),
    }
    names = [*records, "a/0003"]

    assert chunk_rows(names, records) == [StatusRow("a", 1, 3)]
    assert next_chunk(names, records) == "a/0001"
    assert next_chunk(["a/0000"], records) is None


def test_a_chunk_waits_for_those_before_it():
    names = ["a/0000", "a/0001", "a/0002"]

    require_parent_done("a/0001", names, {"a/0000": record("a/0000")})
    with pytest.raises(ChunkError, match="a/0001 comes before it and is not complete"):
        require_parent_done("a/0002", names, {"a/0000": record("a/0000")})
    with pytest.raises(ChunkError, match=r"b/0000: not in this run's data\.chunks"):
        require_parent_done("b/0000", names, {})


def test_patterns_give_their_chunks_in_order_and_none_twice(run_toml):
    workspace = run_toml.parent / "workspace"

    chunks = campaign_chunks(workspace, ["made/0001", "made/*"])

    assert [chunk.name for chunk in chunks] == ["made/0001", "made/0000"]
    with pytest.raises(ChunkError, match=r"'x/\*' matches no chunk .* there are made/0000, made/0001"):
        campaign_chunks(workspace, ["x/*"])


def test_images_are_counted_by_the_data_set_they_come_from(run_toml):
    chunks = campaign_chunks(run_toml.parent / "workspace", ["made/*"])

    rows = image_rows(chunks, {"made/0000": replace(record("made/0000"), images_trained=4)})

    assert rows == [StatusRow("cats", 3, 3), StatusRow("dogs", 1, 1)]
    assert sum(row.done + row.remaining for row in rows) == 8
