"""The page, the text and the JSON of a report hold the same numbers; the page needs nothing and hides nothing."""

import json
import re
from dataclasses import asdict
from html import escape
from html.parser import HTMLParser

import pyarrow as pa
import pytest

from sharding.report import make_report
from sharding.reporting.html import render_html, write_page
from sharding.reporting.tables import ReportTable, report_tables, table_as_markdown, table_as_text
from sharding.schema import CAPTIONS, GROUPS, HELD_OUT, MANIFEST, PLAN, SCORES
from sharding.tables import part_name, write_part


def write(folder, rows, schema, **metadata):
    rows = [dict.fromkeys(schema.names) | row for row in rows]
    table = pa.Table.from_pylist(rows, schema=schema)
    write_part(folder / part_name(0), table, made_from="x", metadata=metadata)


def caption(key, **groups):
    return {"key": key, "text": "", "groups": [{"group": name, "tags": tags} for name, tags in groups.items()]}


@pytest.fixture
def filled(workspace, save, paint):
    """Four planned pictures, one of them held out, two in a duplicate group; one has no caption, one no score."""
    records = []
    for number in range(5):
        save(f"{number}.jpg", paint(number, 120, 60))
        records.append({"key": f"{number:016x}", "source": "photos", "path": f"{number}.jpg", "status": "kept",
                        "num_bytes": 3_000, "width": 120, "height": 60, "format": "jpeg"})  # fmt: skip
    write(workspace.manifest, records, MANIFEST)
    write(workspace.kept, records[:4], MANIFEST)
    members = [{"group": 0, "key": f"{n:016x}", "is_keeper": n == 0, "distance": distance, "rule": "bytes",
                "kind": kind} for n, distance, kind in ((0, 0, ""), (3, None, "crop"), (4, 5, "near"))]  # fmt: skip
    write(workspace.dedupe / "groups", members, GROUPS)
    plan = [{"key": f"{number:016x}", "dataset": "photos", "period": "", "chunk": chunk, "position": 0, "repeats": 2}
            for number, chunk in enumerate((0, 0, 1, HELD_OUT))]  # fmt: skip
    write(workspace.plan, plan, PLAN)
    captions = [
        caption(f"{0:016x}", aesthetic=["very aesthetic"], rating=["nsfw"], rest=["<b>"]),
        caption(f"{1:016x}", aesthetic=["very aesthetic"], rating=["explicit nsfw"]),
        caption(f"{2:016x}", rating=["explicit nsfw"]),
        caption("f" * 16, aesthetic=["very aesthetic"], rating=["general"]),  # not planned
    ]
    write(workspace.captions("default"), captions, CAPTIONS)
    write(workspace.annotations("aes"), [{"key": f"{0:016x}", "score": 0.9, "status": "ok"},
                                         {"key": f"{1:016x}", "status": "undecodable"}], SCORES,
          model="org/model", revision="main")  # fmt: skip
    return workspace


@pytest.fixture
def config(make_config):
    tiers = {"aesthetic": {"model": "aes", "comparison": ">=", "steps": [[0.5, "very aesthetic"]], "rest": "plain"}}
    return make_config(
        policies={"default": {"groups": ["aesthetic", "rating", "rest"], "tiers": tiers, "custom": {"photos": "<i>&"}}},
    )


def tables_of(report) -> dict[str, ReportTable]:
    return {table.name: table for table in report_tables(report)}


def test_words_are_counted_over_planned_pictures_and_whole(config, filled):
    tables = tables_of(make_report(config, filled))

    assert tables["words of aesthetic"].head == ("score at least", "aesthetic tag", "count")
    assert tables["words of aesthetic"].rows == (
        ("0.50", "very aesthetic", "2"), ("rest of them", "plain", "0"), ("", "no aesthetic tag", "2"),
    )  # fmt: skip
    # "explicit nsfw" holds the word nsfw and is not counted as it; the picture without a caption has no rating
    assert tables["words of rating"].rows == (
        ("general", "0"), ("sensitive", "0"), ("nsfw", "1"), ("explicit nsfw", "2"), ("no rating tag", "1"),
    )  # fmt: skip
    assert "words of rest" not in tables
    assert tables["models"].rows == (("aes", "org/model", "main", "2", "1"),)


def test_held_out_pictures_and_repeats_have_their_own_columns(config, filled):
    report = make_report(config, filled)

    table = tables_of(report)["datasets"]
    row = dict(zip(table.head, table.rows[0], strict=True))
    assert (row["total images"], row["total chunk"], row["in the last"]) == ("3", "2", "1")
    assert (row["held out"], row["per epoch"]) == ("1", "6")
    assert [(chunk.name, chunk.state) for chunk in report.chunks] == [
        ("photos/0000", "planned"), ("photos/0001", "planned"), ("photos/held-out", "held out, planned"),
    ]  # fmt: skip


def test_text_json_and_page_hold_the_same_numbers(config, filled):
    report = make_report(config, filled)
    text, page = report.summary(), render_html(report)

    for table in report_tables(report):
        for row in table.rows:
            for cell in filter(None, row):
                assert cell in text
                assert escape(cell) in page or table.name == "chunks"
    values = json.loads(json.dumps(asdict(report)))
    assert values["words"][0]["num_without"] == 2 and values["duplicates"]["by_size"] == [[3, 1]]
    assert values["duplicates"]["by_kind"] == [["crop", 1], ["near", 1]]


_VOID = ("meta", "img")


class Page(HTMLParser):
    """Collect what a browser would fetch, and check that tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href") and value]
        assert tag not in ("script", "link", "iframe")
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_one_file_with_pictures_and_no_network(config, filled, tmp_path):
    report = make_report(config, filled)
    write_page(config, filled, report, tmp_path / "r.html", num_samples=6)
    write_page(config, filled, report, tmp_path / "again.html", num_samples=6)

    text = (tmp_path / "r.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == [] and len(page.links) == 7  # four samples, three members of the group
    assert all(link.startswith("data:image/webp;base64,") for link in page.links)
    assert text == (tmp_path / "again.html").read_text()
    assert "<td>&lt;i&gt;&amp;</td>" in text and "<i>&" not in text
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert "5 bits, bytes" in text and "crop, bytes" in text and "2 images have no aesthetic tag" in text


def test_pictures_that_are_gone_or_unwanted_are_not_shown(config, filled, tmp_path):
    report = make_report(config, filled)
    (config.sources["photos"].root / "4.jpg").unlink()
    (config.sources["photos"].root / "1.jpg").write_bytes(b"no picture")

    write_page(config, filled, report, tmp_path / "some.html", num_samples=6)
    write_page(config, filled, report, tmp_path / "none.html", num_samples=0)

    assert (tmp_path / "some.html").read_text().count("data:image") == 5
    assert "no picture</div>" in (tmp_path / "some.html").read_text()
    assert "data:image/webp" not in (tmp_path / "none.html").read_text()


def test_the_bytes_of_pictures_are_bounded(config, filled, tmp_path, monkeypatch):
    monkeypatch.setattr("sharding.reporting.html.MAX_PICTURE_BYTES", 3_000)

    write_page(config, filled, make_report(config, filled), tmp_path / "r.html", num_samples=6)

    encoded = re.findall(r"base64,([^\"]+)", (tmp_path / "r.html").read_text())
    assert 0 < sum(map(len, encoded)) <= 4_000


def test_an_empty_workspace_has_a_page_too(config, workspace):
    report = make_report(config, workspace)

    assert report.account == "0 files = 0 packed + 0 dropped"
    assert "Custom tags" in render_html(report)


def test_tables_as_text_and_markdown():
    table = ReportTable("n", "T", ("name", "count"), (("a|b", "1,000"), ("<c>", "2")), total=("Total", "1,002"))

    assert table_as_text(table) == ["name   count", "a|b    1,000", "<c>        2", "Total  1,002"]
    assert table_as_markdown(table) == [
        "| name | count |", "|---|---:|", "| a\\|b | 1,000 |", "| &lt;c> | 2 |", "| **Total** | **1,002** |",
    ]  # fmt: skip


def test_the_command_writes_the_page_beside_its_answer(run, tmp_path):
    assert run("scan")[0] == 0

    code, text = run("report", "--html", str(tmp_path / "r.html"), "--samples", "1", "--json")

    assert code == 0 and json.loads(text)["waiting"][0]["stage"] == "dedupe"
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
