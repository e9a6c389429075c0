"""Stats, histograms and what-ifs: against counts worked out in plain Python, and on the page."""

import io
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from captioning import cli
from captioning.compose import compose
from captioning.edit_operations import replace_tags
from captioning.edits import edit_captions
from captioning.histogram_drawing import draw_histogram, spread_out
from captioning.score_histograms import MAX_BINS, Edge, nice_bins, score_histograms
from captioning.stats import stats
from captioning.stats_page import stats_page, what_if_page
from captioning.tag_counts import WordCounter
from captioning.text_table import number_text, short_word, text_table
from captioning.thumbnails import make_thumbnails
from captioning.what_if import parse_edges, what_if
from sharding.chunk import Sample, commit_chunk, write_shard
from sharding.config import ConfigError
from sharding.schema import CAPTIONS
from sharding.tables import part_name

TIERS = {
    "aesthetic": {
        "model": "aes",
        "comparison": ">",
        "steps": [[0.8, "very aesthetic"], [0.5, "aesthetic"]],
        "rest": "displeasing",
    },
    "quality": {"model": "qual", "comparison": ">=", "steps": [[0.5, "good"]], "rest": ""},
}


def captions(rows):
    """Return CAPTIONS of lists of (group, words)."""
    listed = [
        {
            "key": str(number),
            "text": ", ".join(word for _, words in groups for word in words),
            "groups": [{"group": group, "tags": list(words)} for group, words in groups],
        }
        for number, groups in enumerate(rows)
    ]
    return pa.Table.from_pylist(listed, schema=CAPTIONS)


# --- words, pairs, lengths ---

NAMES = st.lists(st.sampled_from("abcdef"), unique=True, max_size=4)
CAPTION_LISTS = st.lists(st.lists(st.tuples(NAMES, NAMES, NAMES), max_size=5), max_size=3)


@settings(deadline=None, max_examples=40)
@given(CAPTION_LISTS)
def test_counts_are_those_of_plain_python(parts):
    counter = WordCounter()
    words, pairs, lengths = Counter(), Counter(), []
    for part in parts:
        rows = []
        for characters, series, rest in part:
            groups = [("character", characters), ("series", [f"s{it}" for it in series]), ("rest", rest)]
            rows.append([(group, own) for group, own in groups if own])
            words.update((group, word) for group, own in groups for word in own)
            pairs.update(frozenset(it) for it in combinations([*characters, *(f"s{it}" for it in series)], 2))
            lengths.append(len(characters) + len(series) + len(rest))
        counter.add(captions(rows))

    assert counter.words == words
    assert {frozenset((it.left, it.right)): it.count for it in counter.top_pairs(10_000)} == pairs
    assert counter.num_captions == len(lengths)
    if lengths:
        found = {it.unit: it for it in counter.lengths()}["words"]
        assert (found.minimum, found.maximum) == (min(lengths), max(lengths))
        assert found.mean == pytest.approx(np.mean(lengths), abs=0.006)
        assert found.median == sorted(lengths)[(len(lengths) - 1) // 2]


def test_top_lists_are_by_count_then_by_alphabet():
    counter = WordCounter()
    counter.add(captions([[("character", ["b", "a"]), ("series", ["x"])], [("character", ["c"]), ("rest", ["r"])]]))

    assert [it.tag for it in counter.top_tags(2)["character"]] == ["a", "b"]
    assert [(it.left, it.left_group, it.right) for it in counter.top_pairs(2)] == [
        ("a", "character", "b"),
        ("a", "character", "x"),
    ]


def test_tokens_are_counted_by_clips_vocabulary():
    counter = WordCounter(tokenizer="training/stage_c/clip_bpe/bpe_simple_vocab_16e6.txt.gz")
    counter.add(captions([[("rest", ["a photo of a cat", "cat"])], [], [("rest", ["cat"])]]))

    tokens = counter.lengths()[2]

    # a photo of a cat , cat = 7; the empty one 0; cat = 1
    assert (tokens.unit, tokens.minimum, tokens.median, tokens.maximum) == ("CLIP tokens", 0, 1, 7)


def test_token_windows_count_every_caption_once():
    counter = WordCounter(tokenizer="training/stage_c/clip_bpe/bpe_simple_vocab_16e6.txt.gz")
    lengths = (0, 75, 76, 150, 151, 225, 226, 400)  # "cat" is one token
    counter.add(captions([[("rest", [" ".join(["cat"] * length)])] if length else [] for length in lengths]))

    assert counter.token_windows() == {"up to 75": 2, "76 to 150": 2, "151 to 225": 2, "more": 2}
    assert WordCounter().token_windows() == {}


# --- text ---


def test_numbers_are_written_as_people_read_them():
    texts = [
        number_text(value) for value in (0, 0.98, 0.0001, 1.542e-06, 2005, 2000.0, 1015.974121, 5_640_000, 0.1 + 0.2)
    ]

    assert texts == ["0", "0.98", "0.0001", "1.54e-06", "2005", "2000", "1015.97", "5,640,000", "0.3"]


def test_columns_stand_below_each_other_in_a_terminal_whatever_the_script():
    table = text_table(("word", "count"), [("初音ミク", "1"), ("cafe\u0301", "12")], numbers=(1,))

    assert table.splitlines() == ["word      count", "--------  -----", "初音ミク      1", "cafe\u0301         12"]
    assert short_word("word " * 40, most=12) == "word word w…" and short_word("word") == "word"


# --- scores ---


@pytest.fixture
def scored(lab):
    """Two parts with known scores, a picture without, and their captions."""
    scores = [{"a": 0.95, "b": 0.81, "c": 0.79, "d": None}, {"e": 0.5, "f": 0.1, "g": 0.8}]
    lab.keep(*([lab.record(key, tags_character=["saber_(fate)"]) for key in part] for part in scores))
    for number, part in enumerate(scores):
        lab.scores("aes", part, part=number)
        lab.scores("qual", dict.fromkeys(part, 0.5), part=number)
        lab.scores("year", dict.fromkeys(part, 2005.0 + number * 19), part=number)
    models = {name: {"kind": "aesthetic_shadow", "model": "unused"} for name in ("aes", "qual", "year")}
    config = lab.config(
        periods={"newest": [2022, 2024], "oldest": [2005, 2010]},
        annotate={"models": models},
        policies={
            "default": {
                "groups": ["aesthetic", "quality", "date", "character", "series"],
                "tiers": TIERS,
                "date": {"model": "year"},
                "tags": {"comparison": ">="},
            }
        },
    )
    compose(config, lab.workspace, policy="default")
    return config


def test_a_report_has_the_cards_tables_tags_pairs_and_spreads(lab, scored):
    report = stats(scored, lab.workspace, policy="default")

    assert [(it.word, it.count) for it in report.tables["aesthetic"]] == [
        ("very aesthetic", 2),
        ("aesthetic", 2),
        ("displeasing", 2),
        ("(none)", 1),
    ]
    assert list(report.tables) == ["aesthetic", "quality", "date"] and list(report.tags) == ["character", "series"]
    assert [(it.left, it.right, it.count) for it in report.pairs] == [("saber", "fate", 7)]
    aes, _, year = report.histograms
    assert (aes.num_scores, aes.num_missing, aes.counts[40], aes.counts[39]) == (6, 1, 2, 1)  # 0.8 and 0.81; 0.79
    assert [(it.value, it.word) for it in aes.edges] == [(0.5, "aesthetic"), (0.8, "very aesthetic")]
    assert (year.low, year.step, year.counts[0], year.counts[-1]) == (2005, 1, 4, 3)
    assert [it.word for it in year.edges] == ["oldest", "newest"]
    assert "saber" in report.summary() and "CLIP" not in report.summary()


def test_words_that_the_policy_does_not_give_are_lines_of_their_own(lab, scored):
    edit = replace_tags("very aesthetic", "masterpiece")
    edit_captions(scored, lab.workspace, edit, policy="default", description="", where="key = a", dry_run=False)

    lines = stats(scored, lab.workspace, policy="default").tables["aesthetic"]

    assert (lines[0].word, lines[0].count) == ("very aesthetic", 1)
    assert [(it.word, it.rule, it.count) for it in lines][3:] == [
        ("masterpiece", "not of the policy", 1),
        ("(none)", "", 1),
    ]


def test_stats_of_captions_that_are_not_current_say_so(lab, scored):
    assert stats(scored, lab.workspace, policy="default").note == ""
    (lab.workspace.captions("default") / part_name(1)).unlink()

    report = stats(scored, lab.workspace, policy="default")

    assert "1 part is missing or not current; run `python -m captioning compose" in report.summary()
    assert "not current" in stats_page(report, name="x")
    (lab.workspace.annotations("aes") / part_name(1)).unlink()
    assert "annotate --models aes" in stats(scored, lab.workspace, policy="default").note


@settings(deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(0, 1e6), st.booleans())
@example(695.0, 0.0, False)
def test_bins_hold_all_scores_between_round_borders(low, span, is_whole):
    low, high = (float(np.floor(low)), float(np.floor(low + span))) if is_whole else (low, low + span)

    start, step, num_bins = nice_bins(low, high, is_whole=is_whole)

    assert 1 <= num_bins <= MAX_BINS
    assert start <= low + 1e-6 * step and high < start + num_bins * step + 1e-6 * step
    assert not is_whole or step >= 1


def test_a_drawing_has_bars_in_their_places_and_marks_edges(lab, scored):
    histogram = score_histograms(scored, lab.workspace, policy="default", scorers=["aes"])[0]

    image = Image.open(io.BytesIO(draw_histogram(histogram, width=960, scale=1)))

    colours = np.asarray(image)
    is_bar = (colours == (0x4A, 0x7D, 0xD6)).all(axis=-1)
    is_axis = (colours[is_bar.any(axis=1).nonzero()[0].max() + 1] == (0x5B, 0x64, 0x75)).all(axis=-1)
    left, right = np.flatnonzero(is_axis)[[0, -1]]
    bin_width = (right - left) / 50
    columns = np.flatnonzero(is_bar.any(axis=0))
    bins = Counter(((columns - left) // bin_width).astype(int).tolist())
    assert {place for place, num_columns in bins.items() if num_columns > bin_width / 2} == {5, 25, 39, 40, 47}
    heights = [int(is_bar[:, int(left + bin_width * (place + 0.5))].sum()) for place in (39, 40)]
    assert heights[1] == pytest.approx(2 * heights[0], rel=0.05)
    is_edge = (colours == (0xC2, 0x41, 0x0C)).all(axis=-1)
    edges = np.flatnonzero(is_edge.sum(axis=0) > 80)
    assert {round((x - left) / (right - left), 2) for x in edges} == {0.5, 0.8}


def test_words_of_close_edges_stand_beside_each_other_and_within_the_picture(lab, scored):
    assert spread_out([10, 12, 50], apart=8, high=60) == [10, 18, 50]
    assert spread_out([55, 56, 60], apart=8, high=60) == [44, 52, 60]
    histogram = score_histograms(scored, lab.workspace, policy="default", scorers=["aes"])[0]
    edges = tuple(Edge(0.99 + number / 1000, "a word of quite some length, or two") for number in range(8))

    image = Image.open(io.BytesIO(draw_histogram(replace(histogram, edges=edges), scale=1)))

    border = np.asarray(image).copy()
    border[1:-1, 1:-1] = 255
    assert (border == 255).all()  # nothing reaches the border, so nothing is cut off


# --- what if ---


def test_a_new_edge_is_counted_and_shown_from_both_sides(lab, scored):
    report = what_if(scored, lab.workspace, {"very_aesthetic": 0.79}, policy="default", num_samples=2)

    (table,) = report.tables
    assert [(it.word, it.count_before, it.count_after) for it in table.words] == [
        ("very aesthetic", 2, 3),  # 0.79 itself is not above 0.79
        ("aesthetic", 2, 1),
        ("displeasing", 2, 2),
        ("(no score)", 1, 1),
    ]
    assert (report.num_pictures, table.num_changed) == (7, 1)
    (edge,) = table.edges
    assert [(it.key, it.word_before, it.word_after) for it in edge.passing] == [
        ("g", "aesthetic", "very aesthetic"),
        ("b", "very aesthetic", "very aesthetic"),
    ]
    assert [it.key for it in edge.failing] == ["c", "e"]
    assert "aesthetic → very aesthetic" in report.summary() and "boards/g.png" in report.summary()


def test_counts_are_those_that_compose_would_make(lab, scored):
    report = what_if(scored, lab.workspace, {"aesthetic.aesthetic": 0.05, "good": 0.6}, policy="default")
    tiers = {
        "aesthetic": TIERS["aesthetic"] | {"steps": [[0.8, "very aesthetic"], [0.05, "aesthetic"]]},
        "quality": TIERS["quality"] | {"steps": [[0.6, "good"]]},
    }
    values = scored.model_dump(mode="json", exclude_defaults=True)
    changed = lab.config(**{name: values[name] for name in ("periods", "annotate")}, policies={
        "default": values["policies"]["default"] | {"tiers": tiers}
    })  # fmt: skip

    compose(changed, lab.workspace, policy="default")
    after = stats(changed, lab.workspace, policy="default")

    for table in report.tables:
        real = {it.word: it.count for it in after.tables[table.group]}
        assert {it.word: it.count_after for it in table.words if it.word in real and it.edge_after} == {
            word: real[word] for word in real if word not in ("displeasing", "(none)")
        }


def test_nothing_is_written_by_a_what_if(lab, scored):
    before = {path: path.read_bytes() for path in lab.workspace.root.rglob("*") if path.is_file()}

    what_if(scored, lab.workspace, {"very aesthetic": 0.6}, policy="default")

    assert {path: path.read_bytes() for path in lab.workspace.root.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ({"very_aesthetic": 0.4}, "'very aesthetic' at 0.4 must be above 'aesthetic' at 0.5"),
        ({"aesthetic": 0.8}, "'very aesthetic' at 0.8 must be above 'aesthetic' at 0.8"),
        ({"lovely": 0.4}, "no tier of policy 'default' with an edge; known: very_aesthetic, aesthetic, good"),
        ({"displeasing": 0.4}, "no tier of policy 'default' with an edge"),
    ],
)
def test_edges_that_make_no_table_are_refused(lab, scored, edges, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        what_if(scored, lab.workspace, edges, policy="default")


def test_a_table_that_sums_scorers_has_no_edge_to_move(lab, scored):
    values = scored.model_dump(mode="json", exclude_defaults=True)
    summed = TIERS["aesthetic"] | {"also": {"qual": [0.8, 0.5]}}
    rules = values["policies"]["default"] | {"tiers": TIERS | {"aesthetic": summed}}
    config = lab.config(periods=values["periods"], annotate=values["annotate"], policies={"default": rules})

    with pytest.raises(ConfigError, match="aesthetic is not decided by one score alone"):
        what_if(config, lab.workspace, {"very_aesthetic": 0.7}, policy="default")


@pytest.mark.parametrize("text", ["very_aesthetic", "=0.5", "very_aesthetic=high", "very_aesthetic=nan", ""])
def test_an_edge_is_a_word_and_a_number(text):
    with pytest.raises(ConfigError, match="expected WORD=NUMBER"):
        parse_edges([text])
    assert parse_edges(["very aesthetic=0.8", "good=1"]) == {"very aesthetic": 0.8, "good": 1.0}
    with pytest.raises(ConfigError, match="two new edges"):
        parse_edges(["good=0.8", "good=1"])


# --- pages and the command ---


def test_pages_hold_everything_and_escape_what_they_show(lab, scored):
    (record,) = lab.save(lab.png(300, 200))
    lab.keep([record | {"tags_character": ["<script>"]}], [lab.record("gone")], made_from="page")
    for part, key in enumerate((record["key"], "gone")):
        for model in ("aes", "qual", "year"):
            lab.scores(model, {key: 0.7}, part=part)
    compose(scored, lab.workspace, policy="default")

    page = stats_page(stats(scored, lab.workspace, policy="default"), name="a <b>")
    report = what_if(scored, lab.workspace, {"very_aesthetic": 0.6}, policy="default")
    thumbnails = make_thumbnails(scored, lab.workspace, [record["key"], "gone"])
    pictures = what_if_page(report, thumbnails, name="x")

    assert "&lt;script&gt;" in page and "a &lt;b&gt;" in page and "<script" not in page
    assert page.count("data:image/png;base64,") == 3
    assert pictures.count("data:image/webp;base64,") == 1 and pictures.count("no picture") == 1
    assert (thumbnails[record["key"]].width, thumbnails[record["key"]].height) == (192, 128)
    assert "http" not in (page + pictures).replace("http-equiv", "")


def test_pictures_whose_files_are_gone_come_from_packed_chunks(lab, scored):
    (record,) = lab.save(lab.png(300, 200))
    lab.keep([record])
    image = lab.pictures / record["path"]
    row = {
        "width": 300, "height": 200, "groups": [], "dataset": "boards", "period": "", "repeats": 1, "loss_weight": 1.0,
    }  # fmt: skip
    sample = Sample(record["key"], image.name, image.read_bytes(), {}, "", row)
    shard, rows = write_shard(lab.workspace.chunks / "boards/0000", 0, [sample])
    facts = {"policy": "p", "shard_policy": "p", "made_from": "m", "seed": 0}
    commit_chunk(lab.workspace.chunks / "boards/0000", rows, name="boards/0000", shards=[shard], **facts)
    before = make_thumbnails(scored, lab.workspace, [record["key"]])
    image.unlink()

    after = make_thumbnails(scored, lab.workspace, [record["key"]])

    assert list(after) == [record["key"]] and after == before


@pytest.fixture
def run(lab, scored, capsys):
    path = lab.folder / "stats.toml"
    values = scored.model_dump(mode="json", exclude_defaults=True)
    lines = [f'name = "s"\nsources.boards.root = "{lab.pictures}"', "policies = " + _inline(values["policies"])]
    lines += ["periods = " + _inline(values["periods"])]
    lines += [
        f'annotate.models.{name} = {{ kind = "aesthetic_shadow", model = "x" }}' for name in ("aes", "qual", "year")
    ]
    path.write_text("\n".join(lines))
    assert cli.main(["compose", str(path), "--workspace", str(lab.workspace.root)]) == 0
    capsys.readouterr()

    def call(*arguments):
        code = cli.main(["stats", str(path), "--workspace", str(lab.workspace.root), *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out if code == 0 else captured.err

    return call


def test_paths_that_cannot_be_written_say_what_to_name(lab, run):
    code, output = run("--html", lab.folder)
    assert code == 2 and "is a folder; name a file in it" in output
    code, output = run("--png", lab.folder / "stats.toml")
    assert code == 2 and "is a file; name a folder" in output


def test_a_reader_that_has_seen_enough_is_no_failure(lab, run):
    arguments = ["stats", str(lab.folder / "stats.toml"), "--workspace", str(lab.workspace.root), "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "captioning", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()

    error = process.stderr.read().decode()

    assert (process.wait(), error) == (0, "")


def test_a_what_if_before_annotate_is_exit_code_3(lab, run):
    (lab.workspace.annotations("aes") / part_name(1)).unlink()

    code, output = run("--what-if", "very_aesthetic=0.82")

    assert code == 3 and "part-00001.parquet: missing; run `python -m captioning annotate --models aes` first" in output


def _inline(value):
    if isinstance(value, dict):
        return "{ " + ", ".join(f'"{key}" = {_inline(it)}' for key, it in value.items()) + " }"
    return "[" + ", ".join(map(_inline, value)) + "]" if isinstance(value, list) else json.dumps(value)


def test_the_command_writes_a_page_pictures_and_json(lab, run):
    code, output = run("--json", "--html", lab.folder / "s.html", "--png", lab.folder / "png", "--top", 1)

    values = json.loads(output)
    assert code == 0 and values["num_captions"] == 7 and len(values["tags"]["character"]) == 1
    assert (lab.folder / "s.html").read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in (lab.folder / "png").iterdir()) == ["aes.png", "qual.png", "year.png"]


def test_the_command_answers_what_if(lab, run):
    code, output = run("--what-if", "very_aesthetic=0.82", "--json", "--html", lab.folder / "w.html")

    words = json.loads(output)["tables"][0]["words"]
    assert code == 0 and [(it["count_before"], it["count_after"]) for it in words[:2]] == [(2, 1), (2, 3)]
    assert "very aesthetic" in (lab.folder / "w.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--what-if", "very_aesthetic=0.3"), "must be above"),
        (("--what-if", "nope=0.3"), "no tier of policy"),
        (("--what-if", "0.3"), "expected WORD=NUMBER"),
        (("--what-if", "good=0.3", "--png", "x"), "--png draws the scores"),
        (("--top", "0"), "--top must be at least 1"),
        (("--samples", "-1"), "--samples 0"),
    ],
)
def test_bad_usage_is_exit_code_2(run, arguments, message):
    code, output = run(*arguments)

    assert code == 2 and message in output and "Traceback" not in output
