"""Edits: what they do to words and groups, where, as an overlay that outlives changes of the policy, and undo."""

import multiprocessing
import re
import time

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioning import cli, edits
from captioning.compose import compose
from captioning.edit_filter import CaptionRow, parse_filter
from captioning.edit_operations import (
    add_tags,
    drop_doubles,
    regroup,
    remove_tags,
    replace_in_caption,
    replace_tags,
    sort_tags,
    truncate,
)
from captioning.edit_table import EditError, merge, read_edits
from captioning.edits import edit_captions, edit_list, undo
from sharding.schema import CAPTIONS, EDITS, MANIFEST
from sharding.tables import part_metadata, part_name, read_part, schema_mismatch, write_part

WORDS = (("aesthetic", "fine"), ("character", "saber"), ("rest", "long hair"), ("rest", "solo"), ("rest", "1girl"))
ROW = CaptionRow(
    "a", WORDS, "fine, saber, long hair, solo, 1girl", source="boards", dataset="newest", scores={"aes": 0.9, "q": None}
)


def words_of(words):
    return [word for _, word in words]


# --- operations ---


def test_a_whole_word_is_replaced_whatever_its_underscores():
    after = replace_tags("long_hair", "very long hair, hair")(WORDS)

    assert after[2:4] == (("rest", "very long hair"), ("rest", "hair"))
    assert words_of(replace_tags("hair", "x")(WORDS)) == words_of(WORDS)


def test_a_regular_expression_replaces_within_words_and_an_empty_result_drops_them():
    assert words_of(replace_tags(r"^(\w+) hair$", r"\1 locks", is_regex=True)(WORDS))[2] == "long locks"
    assert words_of(replace_tags(".*", "", is_regex=True, group="rest")(WORDS)) == ["fine", "saber"]


def test_a_word_replaced_by_one_that_stands_already_stands_once():
    assert words_of(replace_tags("long hair", "solo")(WORDS)) == ["fine", "saber", "solo", "1girl"]


def test_text_replaced_in_the_whole_caption_stays_in_its_groups():
    after = replace_in_caption("saber, long hair", "artoria, short hair")(WORDS)

    assert after[1:3] == (("character", "artoria"), ("rest", "short hair"))
    assert [group for group, _ in after] == [group for group, _ in WORDS]


def test_words_that_take_no_others_place_go_to_the_group_before():
    assert regroup(WORDS, "new, fine, saber, newer, long hair, solo, 1girl")[:4] == (
        ("aesthetic", "new"),
        ("aesthetic", "fine"),
        ("character", "saber"),
        ("character", "newer"),
    )
    assert regroup((), "a, b") == (("rest", "a"), ("rest", "b"))


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "c", "d", "e"]), unique=True), st.integers(0, 3))
def test_any_new_caption_keeps_the_order_of_groups(new, cut):
    before = (("x", "a"), ("y", "b"), ("y", "c"), ("z", "d"))[cut:]

    after = regroup(before, ", ".join(new))

    assert words_of(after) == new
    groups = [group for group, _ in after]
    assert not before or groups == sorted(groups)


def test_words_are_added_once_at_the_head_or_tail_removed_sorted_deduped_and_cut():
    assert words_of(add_tags(["Solo", "solo", "smile"], group="rest")(WORDS)) == [*words_of(WORDS), "Solo", "smile"]
    assert add_tags(["smile"], group="rest", place="head")(WORDS)[0] == ("rest", "smile")
    assert words_of(remove_tags(["long_hair", "saber"], group="rest")(WORDS)) == ["fine", "saber", "solo", "1girl"]
    assert words_of(remove_tags(["o"], is_regex=True)(WORDS)) == ["fine", "saber", "1girl"]
    assert words_of(sort_tags(group="rest")(WORDS)) == ["fine", "saber", "1girl", "long hair", "solo"]
    assert words_of(sort_tags(group="rest", by="length")(WORDS)) == ["fine", "saber", "solo", "1girl", "long hair"]
    assert words_of(drop_doubles((("rest", "Long_Hair"), ("rest", "long hair"), ("rest", "o_o")))) == [
        "Long_Hair",
        "o_o",
    ]
    assert words_of(truncate(2)(WORDS)) == ["fine", "saber"]


# --- filters ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", True),
        ("tag = solo", True),
        ("tag = long_hair and tag = saber", True),
        ("tag = solo and tag = nothing", False),
        ("tag = nothing or rest = 1girl", True),
        ("not tag = solo", False),
        ("tag != solo", False),
        ("not (tag = x or tag = y)", True),
        ("tag = x or tag = y and tag = solo", False),
        ("character = solo", False),
        ("character ~ ^sab", True),
        ("dataset = newest and source = boards", True),
        ("caption ~ 'hair, solo'", True),
        ("key = b", False),
        ("score.aes >= 0.9", True),
        ("score.aes > 0.9", False),
        ("score.q < 5 or not score.aes < 0.5", True),
        ("score.q < 5", False),
        ('tag = "and"', False),
    ],
)
def test_filters_join_words_texts_and_scores(text, expected):
    row = CaptionRow(**vars(ROW) | {"scores": {"aes": float(np.float32(0.9)), "q": None}})

    assert parse_filter(text, groups=("character", "rest"), scorers=("aes", "q")).matches(row) is expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tags = solo", "unknown field 'tags'; known: tag, caption, key, source, dataset, rest, score.aes"),
        ("score.nope > 1", "unknown field 'score.nope'; scorers: aes"),
        ("score.aes > high", "not a number"),
        ("score.aes ~ 1", "compare numbers"),
        ("tag > solo", "only =, != and ~"),
        ("tag = long hair", "unexpected 'hair'"),
        ("tag ~ '('", "regular expression '('"),
        ("tag = 'solo", "a quote missing"),
        ("(tag = solo", "')' is needed"),
        ("tag =", "ends where a value after tag = is needed"),
        ("and", "ends where"),
        ("= x", "the name of a field is needed"),
    ],
)
def test_a_filter_that_cannot_be_read_says_where(text, message):
    with pytest.raises(EditError, match=re.escape(message)):
        parse_filter(text, groups=("rest",), scorers=("aes",))


# --- the overlay ---


def test_a_merge_keeps_what_the_policy_has_come_to_say():
    assert merge(("a", "b"), ("a", "b"), ("b",)) == ("b",)
    assert merge(("a", "b", "new"), ("a", "b"), ("b", "mine")) == ("b", "mine", "new")
    assert merge(("b",), ("a", "b"), ("b", "a", "mine")) == ("b", "mine")
    assert merge(("poor",), ("fair",), ("fine",)) == ("fine",)


@pytest.fixture
def small(lab):
    """Three captions in two parts, and a config whose general threshold can be given."""

    def config(threshold=0.35):
        tags = {"tagger": "", "comparison": ">=", "general_threshold": threshold}
        groups = ["date", "character", "series", "rest"]
        return lab.config(
            periods={"newest": [2022, 2024]},
            annotate={"models": {"aes": {"kind": "aesthetic_shadow", "model": "unused"}}},
            policies={"default": {"groups": groups, "tags": tags}},
        )

    lab.keep(
        [lab.record("a", tags_general=["solo", "long_hair"]), lab.record("b", tags_general=["solo"])],
        [lab.record("c", tags_general=["solo", "smile"], tags_character=["saber_(fate)"])],
    )
    for part, scores in enumerate(({"a": 0.9, "b": None}, {"c": 0.2})):
        lab.scores("aes", scores, part=part)
    compose(config(), lab.workspace, policy="default")
    return config


def edit(lab, config, operation, **options):
    options = {"policy": "default", "description": "test", "who": "me", "why": "", "dry_run": False} | options
    return edit_captions(config, lab.workspace, operation, **options)


def all_texts(lab):
    return lab.texts() + lab.texts(part=1)


def test_a_preview_writes_nothing_and_shows_a_diff(lab, small):
    report = edit(lab, small(), remove_tags(["solo"]), dry_run=True, num_shown=1)

    assert (report.num_matching, report.num_changed, len(report.shown)) == (3, 3, 1)
    assert "--- a (boards)\n+++ a (boards)\n@@ -1,3 +1,2 @@\n date: newest\n-rest: solo\n" in report.summary()
    assert "and 2 more" in report.summary() and "nothing was written" in report.summary()
    assert not lab.workspace.edits("default").exists()
    assert all_texts(lab)[0] == "newest, solo, long hair"


def test_an_edit_changes_only_the_parts_it_touches_and_undo_brings_the_same_bytes_back(lab, small):
    parts = [lab.workspace.captions("default") / part_name(number) for number in range(2)]
    before = [part.read_bytes() for part in parts]

    edit(lab, small(), replace_tags("solo", "alone"), where="score.aes > 0.5")

    assert all_texts(lab) == ["newest, alone, long hair", "newest, solo", "newest, saber, fate, solo, smile"]
    assert parts[0].read_bytes() != before[0] and parts[1].read_bytes() == before[1]
    table = read_part(parts[0])
    assert schema_mismatch(table, CAPTIONS) == ""
    assert table.column("groups").to_pylist()[0][1] == {"group": "rest", "tags": ["alone", "long hair"]}
    undo(small(), lab.workspace, None, policy="default", dry_run=False)
    assert [part.read_bytes() for part in parts] == before


def test_captions_do_not_depend_on_who_when_and_why(lab, small):
    part = lab.workspace.captions("default") / part_name(0)

    edit(lab, small(), remove_tags(["solo"]), who="me", why="because")
    first = part.read_bytes(), part_metadata(part)["made_from"]
    undo(small(), lab.workspace, None, policy="default", dry_run=False)
    time.sleep(0.002)
    edit(lab, small(), remove_tags(["solo"]), who="you")

    assert (part.read_bytes(), part_metadata(part)["made_from"]) == first
    table = read_edits(lab.workspace, "default")
    assert schema_mismatch(table, EDITS) == "" and set(table.column("who").to_pylist()) == {"you"}


def test_edits_build_on_each_other_and_any_can_be_undone(lab, small):
    edit(lab, small(), add_tags(["best"], group="series"), description="add best")
    edit(lab, small(), replace_tags("best", "worst"), where="key = c")
    assert all_texts(lab)[2] == "newest, saber, fate, worst, solo, smile"
    assert [
        (it.number, it.operation, it.num_captions) for it in edit_list(small(), lab.workspace, policy="default").edits
    ] == [
        (1, "add best", 3),
        (2, "test", 1),
    ]

    report = undo(small(), lab.workspace, 1, policy="default", dry_run=True)
    assert "would be undone" in report.summary() and "best" in all_texts(lab)[0]
    undo(small(), lab.workspace, 1, policy="default", dry_run=False)

    assert all_texts(lab)[:2] == ["newest, solo, long hair", "newest, solo"]
    assert all_texts(lab)[2] == "newest, saber, fate, worst, solo, smile"  # the second edit still puts its word


def test_an_edit_outlives_new_tags_of_the_policy(lab, small):
    edit(lab, small(), remove_tags(["solo"]))
    rows = [lab.record("a", tags_general=["solo", "long_hair", "hat"]), lab.record("b", tags_general=["solo"])]
    write_part(lab.workspace.kept / part_name(0), pa.Table.from_pylist(rows, schema=MANIFEST), made_from="new records")

    compose(small(), lab.workspace, policy="default")

    assert lab.texts() == ["newest, long hair, hat", "newest"]


def test_captions_that_are_not_current_are_not_edited(lab, small):
    with pytest.raises(EditError, match="2 parts are missing or not current; run `python -m captioning compose"):
        edit(lab, small(0.5), remove_tags(["solo"]))


def test_two_edits_at_once_wait_for_each_other_and_both_hold(lab, small):
    context = multiprocessing.get_context("fork")
    tags = ["first", "second", "third"]
    tasks = [context.Process(target=edit, args=(lab, small(), add_tags([tag], group="rest"))) for tag in tags]

    for task in tasks:
        task.start()
    for task in tasks:
        task.join()

    assert [task.exitcode for task in tasks] == [0, 0, 0]
    assert [it.number for it in edit_list(small(), lab.workspace, policy="default").edits] == [1, 2, 3]
    assert all(set(tags) < set(text.split(", ")) for text in all_texts(lab))
    assert edit(lab, small(), add_tags(["fourth"], group="rest"), dry_run=True).num_changed == 3  # all is current


@pytest.mark.parametrize("options", [{}, {"where": r"caption ~ '([\w, ]+)+!$'"}])
def test_a_regular_expression_that_does_not_end_is_stopped(lab, small, monkeypatch, options):
    monkeypatch.setattr(edits, "SECONDS_PER_CAPTION", 0.2)
    lab.keep([lab.record("a", tags_general=["long_hair"] * 30 + [f"tag {n}" for n in range(30)])], made_from="long")
    (lab.workspace.kept / part_name(1)).unlink()
    compose(small(), lab.workspace, policy="default")
    operation = add_tags(["x"], group="rest") if options else replace_in_caption(r"([\w, ]+)+!$", "", is_regex=True)

    with pytest.raises(EditError, match=r"caption a: more than 0.2 s; a regular expression .* inside a repetition"):
        edit(lab, small(), operation, **options)


def test_ten_thousand_captions_take_seconds(lab, small):
    tags = ["solo", "smile", *(f"tag_{number}" for number in range(30))]
    lab.keep([lab.record(f"{number:016x}", tags_general=tags) for number in range(10_000)], made_from="many")
    (lab.workspace.kept / part_name(1)).unlink()
    compose(small(), lab.workspace, policy="default")
    started = time.process_time()

    report = edit(lab, small(), replace_tags("smile", "grin"), where="not tag = hat")

    assert report.num_changed == 10_000 and time.process_time() - started < 10
    assert all("grin" in text for text in lab.texts())


# --- the command ---


@pytest.fixture
def run(lab, small, capsys):
    path = lab.folder / "edit.toml"
    path.write_text(
        f'name = "edit"\nsources.boards.root = "{lab.pictures}"\n[periods]\nnewest = [2022, 2024]\n'
        '[annotate.models.aes]\nkind = "aesthetic_shadow"\nmodel = "unused"\n'
        '[policies.default]\ngroups = ["date", "character", "series", "rest"]\ntags.comparison = ">="\n'
    )
    assert cli.main(["compose", str(path), "--workspace", str(lab.workspace.root)]) == 0
    capsys.readouterr()

    def call(*arguments):
        code = cli.main(["edit", str(path), "--workspace", str(lab.workspace.root), *arguments])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return call


def test_the_command_previews_writes_lists_and_undoes(lab, run):
    arguments = ("remove", "solo", "--where", "tag = smile", "--why", "not alone", "--who", "me")

    assert "1 would change" in run(*arguments)[1]
    assert "\033[31m-rest: solo" in run(*arguments, "--colour", "always")[1]
    assert "1 changed by edit 1" in run(*arguments, "--yes")[1]
    assert all_texts(lab)[2] == "newest, saber, fate, smile"
    assert re.search(r"1 .* me .* remove solo --where 'tag = smile' +not alone", run("list")[1])
    assert run("undo", "--yes")[0] == 0
    assert run("list")[1] == "default: no edits\n"
    assert all_texts(lab)[2] == "newest, saber, fate, solo, smile"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("replace", "solo", "alone"), "newest, alone, long hair"),
        (("replace", "(so)lo", r"\1", "--regex"), "newest, so, long hair"),
        (("replace", "solo, long", "a, short", "--in", "caption"), "newest, a, short hair"),
        (("set", "newest, b"), "newest, b"),
        (("add", "c", "d", "--at", "head", "--group", "character"), "newest, c, d, solo, long hair"),
        (("sort",), "newest, long hair, solo"),
        (("truncate", "1"), "newest"),
        (("dedupe",), "newest, solo, long hair"),
    ],
)
def test_every_operation_has_its_command(lab, run, arguments, text):
    code, _ = run(*arguments, "--where", "key = a", "--yes", "--policy", "default")

    assert code == 0 and all_texts(lab)[0] == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("remove", "solo", "--where", "nope = 1"), "unknown field 'nope'; known: tag, caption"),
        (("remove", "solo", "--where", "key = zzz"), "matches none of 3 captions"),
        (("remove", ""), "a word to look for is empty"),
        (("remove", "", "--regex"), "a word to look for is empty"),
        (("replace", "", "x", "--regex"), "the words to look for are empty"),
        (("replace", "", "x", "--regex", "--in", "caption"), "the text to look for is empty"),
        (("remove", "solo", "--where", "tag ~ '('"), "--where \"tag ~ '('\": regular expression '('"),
        (("remove", "(", "--regex"), "regular expression '('"),
        (("replace", "solo", r"\1", "--regex"), "replacement '\\\\1': invalid group reference 1"),
        (("replace", "", "x"), "the words to look for are empty"),
        (("add", " , "), "no words are given"),
        (("add", "x", "--group", "nope"), "--group 'nope': unknown; policy 'default' has date, character"),
        (("replace", "a", "b", "--in", "caption", "--group", "rest"), "no meaning with --in caption"),
        (("truncate", "-1"), "must be 0 or more"),
        (("sort", "--show", "-1"), "--show -1"),
        (("undo",), "there is no edit to undo"),
        (("list", "--policy", "nope"), "policy 'nope': unknown"),
    ],
)
def test_what_cannot_be_edited_is_exit_code_2(run, arguments, message):
    code, output = run(*arguments)

    assert code == 2 and message in output and "Traceback" not in output


def test_undoing_an_unknown_edit_names_the_known_ones(run):
    run("remove", "solo", "--yes")

    code, output = run("undo", "7", "--yes")

    assert code == 2 and "edit 7: unknown; there are 1" in output


def test_a_damaged_edit_is_exit_code_3(lab, run):
    run("remove", "solo", "--yes")
    (lab.workspace.edits("default") / part_name(1)).write_bytes(b"torn")

    code, output = run("remove", "smile")

    assert code == 3 and "part-00001.parquet: not a readable part" in output
