"""dedupe explain, contact sheets and czkawka's form: what people look at."""

import csv
import json
from datetime import UTC, datetime

import pytest
from PIL import Image

from sharding.decisions import add_decisions, make_decisions
from sharding.dedupe import dedupe
from sharding.duplicates.contact_sheet import TILE, draw_contact_sheet
from sharding.duplicates.czkawka import export_czkawka
from sharding.duplicates.explain import explain
from sharding.plan import make_plan
from sharding.scan import scan
from sharding.tables import read_parts


@pytest.fixture
def line(save, paint, make_config, workspace):
    """Picture 0 in three sizes, its identical copy, a mirrored one, and picture 9."""
    image = paint(0, 400, 300)
    path = save("big.png", image)
    save("copy.png", path.read_bytes())
    save("mid.jpg", image.resize((300, 225)))
    save("small.jpg", image.resize((200, 150)))
    save("mirror.png", image.resize((240, 180)).transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    save("other.png", paint(9, 400, 300))
    config = make_config(dedupe={"turns": ["mirror"]})
    scan(config, workspace, workers=0)
    dedupe(config, workspace)
    return config, workspace


def key_of(workspace, path):
    return next(row["key"] for row in read_parts(workspace.manifest).to_pylist() if row["path"] == path)


def test_a_dropped_picture_is_compared_with_its_keeper(line):
    config, workspace = line
    [told] = explain(config, workspace, key_of(workspace, "small.jpg"))

    assert told.rival == key_of(workspace, "big.png")
    assert [(c.name, c.winner) for c in told.criteria][-2:] == [("priority", ""), ("pixels", "other")]
    assert told.criteria[-1].this == "200x150" and told.criteria[-1].other == "400x300"
    assert told.group[0].kind == "keeper"
    assert {other.kind for other in told.group[1:]} == {"near", "turned", "exact"}
    assert "pixels: 200x150 against 400x300 → other wins" in told.summary()


def test_a_keeper_is_compared_with_its_closest_rival_and_found_by_path(line):
    config, workspace = line
    [told] = explain(config, workspace, "big.png")

    assert told.rival == key_of(workspace, "mid.jpg") and told.criteria[-1].winner == "this"


def test_being_planned_is_no_reason_for_a_keeper_that_was_planned_because_it_won(line):
    config, workspace = line
    small = key_of(workspace, "small.jpg")
    make_plan(config, workspace)

    assert explain(config, workspace, small)[0].criteria[-1].name == "pixels"

    add_decisions(workspace, make_decisions(read_key(small), decision="preferred_keeper", who="me", why="nicer"))
    dedupe(config, workspace)
    [last] = explain(config, workspace, small)[0].criteria[-1:]
    assert (last.name, last.winner) == ("planned", "other")


def test_a_picture_alone_is_told_to_be_so(line):
    [told] = explain(*line, "other.png")

    assert "no other picture is like it" in told.summary() and "kept" in told.fate


def test_decisions_are_the_reason_for_being_apart(line):
    config, workspace = line
    mid = key_of(workspace, "mid.jpg")
    add_decisions(workspace, make_decisions(read_key(mid), decision="not_a_duplicate", who="me", why="other face"))
    dedupe(config, workspace)

    [told] = explain(config, workspace, mid)

    assert told.group == () and told.near[0].note == f"not_a_duplicate was decided about {mid}"
    assert "decided: not_a_duplicate by me" in told.fate
    relatives = read_parts(workspace.dedupe / "relatives").column("key").to_pylist()
    assert sorted(relatives) == sorted([mid, key_of(workspace, "big.png")])


def read_key(key):
    import pyarrow as pa

    return pa.array([key])


def test_what_was_never_deduped_cannot_be_explained(make_config, workspace, save, paint, tmp_path):
    config = make_config()
    for call in (
        lambda: explain(config, workspace, "a" * 16),
        lambda: draw_contact_sheet(config, workspace, tmp_path / "x.png"),
        lambda: export_czkawka(config, workspace, tmp_path / "x.json"),
    ):
        with pytest.raises(FileNotFoundError, match="run `python -m sharding dedupe` first"):
            call()


def test_a_drop_names_its_turn(line):
    _, workspace = line
    drops = {row["path"]: row for row in read_parts(workspace.dedupe / "drops").to_pylist()}

    assert drops["mirror.png"]["reason"] == "turned_copy"
    assert drops["mirror.png"]["detail"].startswith("mirror, pixels: 240x180 png")


# --- contact sheet ---


def test_a_contact_sheet_shows_the_keeper_at_the_left(line, tmp_path):
    config, workspace = line
    sheet = draw_contact_sheet(config, workspace, tmp_path / "sheet.png", num_groups=3)

    image = Image.open(tmp_path / "sheet.png").convert("RGB")
    assert (sheet.num_groups, sheet.num_all_groups, sheet.num_unreadable) == (1, 1, 0)
    assert image.width > 4 * TILE
    left, second = (image.crop((x, 8 + 30, x + TILE, 8 + TILE - 30)).resize((24, 18)) for x in (8, 16 + TILE))
    assert left.getcolors(1000) != second.getcolors(1000)


def test_a_missing_file_leaves_its_place_grey(line, tmp_path):
    config, workspace = line
    (tmp_path / "raw/small.jpg").unlink()

    assert draw_contact_sheet(config, workspace, tmp_path / "sheet.png").num_unreadable == 1
    with pytest.raises(ValueError, match=r"must end in \.png"):
        draw_contact_sheet(config, workspace, tmp_path / "sheet.jpg")


# --- czkawka ---


def test_groups_in_czkawkas_form(line, tmp_path):
    config, workspace = line
    assert export_czkawka(config, workspace, tmp_path / "out.json") == (1, 5)
    assert export_czkawka(config, workspace, tmp_path / "out.csv") == (1, 5)

    [group] = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert list(group[0]) == ["path", "size", "width", "height", "modified_date", "difference"]
    assert group[0]["path"] == str(tmp_path / "raw/big.png") and group[0]["difference"] == 0
    assert [entry["path"].rsplit("/", 1)[1] for entry in group[:2]] == ["big.png", "copy.png"]
    assert datetime.fromtimestamp(group[0]["modified_date"], tz=UTC).year >= 2024
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["path"] for row in rows] == [entry["path"] for entry in group]
    with pytest.raises(ValueError, match=r"must end in \.json or \.csv"):
        export_czkawka(config, workspace, tmp_path / "out.txt")
