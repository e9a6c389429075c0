import json
import shutil

import pytest

from sharding.chunk import ChunkError
from sharding.config import ConfigError
from training.campaign import Campaign, chunk_range, in_turn, next_chunk, read_campaign, require_turn_of
from training.chunk_history import ChunkRecord
from training.run_dir import RunDir
from training.status_tables import StatusRow, campaign_counts, chunk_rows, dataset_rows, period_rows, render_rows

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


def campaign_of(names, records, epochs=1):
    return Campaign(tuple(names), {}, (), records, lambda _: epochs)


def test_the_card_of_the_seed_adds_up():
    names = [f"{dataset}/{number:04d}" for dataset, remaining in CARD.items() for number in range(4 + remaining)]
    records = {name: record(name) for name in names if int(name[-4:]) < 4}

    rows = chunk_rows(campaign_of(names, records))
    table = render_rows("dataset name", "chunks", rows).splitlines()

    assert rows == [StatusRow(dataset, 4, remaining) for dataset, remaining in CARD.items()]
    assert table[0].split("|")[1:5] == [" dataset name    ", " training done ", " remaining ", " total chunks "]
    assert table[-1].replace(" ", "") == "|**Total**|32|676|708|"
    assert len({len(line) for line in table}) == 1


def test_a_chunk_under_way_or_superseded_is_not_done():
    records = {
        "a/0000": record("a/0000"),
        "a/0001": record("a/0001", "running"),
        "a/0002": record("a/0002", "superseded"),
    }
    names = [*records, "a/0003"]

    assert chunk_rows(campaign_of(names, records)) == [StatusRow("a", 1, 3)]
    assert next_chunk(names, records) == "a/0001"
    assert next_chunk(["a/0000"], records) is None


def test_a_chunk_waits_for_those_before_it():
    names = ["a/0000", "a/0001", "a/0002"]

    require_turn_of("a/0001", names, {"a/0000": record("a/0000")})
    with pytest.raises(ChunkError, match="a/0001 comes before it and is not complete"):
        require_turn_of("a/0002", names, {"a/0000": record("a/0000")})
    with pytest.raises(ChunkError, match=r"b/0000: not in this run's data\.chunks"):
        require_turn_of("b/0000", names, {})


def test_patterns_give_their_chunks_in_order_and_none_twice(run_toml):
    workspace = run_toml.parent / "workspace"

    campaign = read_campaign(workspace, ["made/0001", "made/*"], None)

    assert campaign.names == ("made/0001", "made/0000")
    assert campaign.next == "made/0001"
    with pytest.raises(ChunkError, match=r"'x/\*' matches no chunk .* there are made/0000, made/0001"):
        read_campaign(workspace, ["x/*"], None)


def test_of_an_extended_run_the_half_trained_chunk_comes_first_then_those_with_fewer_epochs():
    names = ["a/0000", "a/0001", "a/0002"]
    records = {name: record(name) for name in names}

    assert next_chunk(names, records, epochs=lambda _: 2) == "a/0000"
    records["a/0001"] = record("a/0001", "running")
    assert next_chunk(names, records, epochs=lambda _: 2) == "a/0001"
    assert in_turn(names, records) == ["a/0001", "a/0000", "a/0002"]
    require_turn_of("a/0001", names, records, epochs=lambda _: 2)
    with pytest.raises(ChunkError, match="chunk a/0000: a/0001 is half trained"):
        require_turn_of("a/0000", names, records, epochs=lambda _: 2)


@pytest.fixture
def run_with_first_chunk_started(run_toml, tmp_path):
    """Return (workspace, run folder): made/0000 is half trained."""
    workspace, run_dir = run_toml.parent / "workspace", RunDir(tmp_path / "run")
    run_dir.root.mkdir()
    run_dir.start_chunk(read_campaign(workspace, ["made/*"], None).chunk("made/0000"))
    ledger = run_dir.open_ledger(guard=lambda: None)
    ledger.append(
        "started", chunk="made/0000", position_in_run=0, parent=None, chunk_digest="", plan_digest="", epochs=1,
        steps=1, images_planned=4, global_step=0, resumed_from=None, devices="1 x CPU",
    )  # fmt: skip
    return workspace, run_dir, ledger


def finish(ledger):
    ledger.append(
        "chunk_done", chunk="made/0000", path="final", manifest_digest="", epoch=1, step=0, global_step=1,
        images_trained=4, applied_updates=1, busy_seconds=1.0,
    )  # fmt: skip


def test_images_are_counted_by_the_data_set_they_come_from(run_with_first_chunk_started):
    workspace, run_dir, ledger = run_with_first_chunk_started
    finish(ledger)

    campaign = read_campaign(workspace, ["made/*"], run_dir)
    counts = campaign_counts(campaign, run_dir)

    assert dataset_rows(campaign, counts) == [StatusRow("cats", 3, 3), StatusRow("dogs", 1, 1)]
    assert period_rows(campaign, counts) == [StatusRow("mid", 4, 4)]


def test_a_finished_chunk_may_be_deleted_from_the_workspace(run_with_first_chunk_started):
    workspace, run_dir, ledger = run_with_first_chunk_started
    finish(ledger)
    shutil.rmtree(workspace / "chunks" / "made" / "0000")

    campaign = read_campaign(workspace, ["made/*"], run_dir)

    assert campaign.names == ("made/0000", "made/0001")
    assert campaign.next == "made/0001"
    assert chunk_rows(campaign) == [StatusRow("made", 1, 1)]
    assert dataset_rows(campaign, campaign_counts(campaign, run_dir)) == [
        StatusRow("cats", 3, 3),
        StatusRow("dogs", 1, 1),
    ]


def test_a_half_trained_chunk_that_is_gone_is_not_passed_over(run_with_first_chunk_started):
    workspace, run_dir, _ = run_with_first_chunk_started
    shutil.rmtree(workspace / "chunks" / "made" / "0000")

    campaign = read_campaign(workspace, ["made/*"], run_dir)

    assert campaign.next == "made/0000"
    with pytest.raises(ChunkError, match="made/0000: this run has started it, but it is gone from the workspace"):
        campaign.chunk("made/0000")


def test_what_is_held_out_is_never_offered_whatever_its_folder_is_called(run_toml):
    workspace = run_toml.parent / "workspace"
    folder = workspace / "chunks" / "made" / "0001"
    facts = json.loads((folder / "chunk.json").read_text())
    (folder / "chunk.json").write_text(json.dumps(facts | {"is_held_out": True}))

    assert read_campaign(workspace, ["made/*"], None).names == ("made/0000",)
    with pytest.raises(ConfigError, match=r"made/held-out: it is held out for validation and no run trains it"):
        read_campaign(workspace, ["made/*", "made/held-out"], None)


@pytest.mark.parametrize(
    ("span", "expected"),
    [("0:1", ["a/0000", "a/0001"]), ("a/0001:", ["a/0001", "b/0000"]), (":a/0000", ["a/0000"]), (":", "all"),
     ("2:2", ["b/0000"])],
)  # fmt: skip
def test_a_range_of_chunks_includes_both_ends(span, expected):
    names = ["a/0000", "a/0001", "b/0000"]

    assert chunk_range(names, span) == (names if expected == "all" else expected)


@pytest.mark.parametrize(
    ("span", "message"),
    [("1", "give two chunks"), ("2:1", "comes before"), ("0:3", "no chunk number 3"), ("c/0000:", "not in this run")],
)
def test_a_range_that_is_none_is_refused(span, message):
    with pytest.raises(ValueError, match=message):
        chunk_range(["a/0000", "a/0001", "b/0000"], span)
