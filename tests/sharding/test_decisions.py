import numpy as np
import pyarrow as pa
import pytest

from sharding import cli
from sharding.decisions import (
    DecisionError,
    add_decisions,
    export_decisions,
    make_decisions,
    parse_decisions,
    read_decisions,
)
from sharding.schema import DECISIONS, MANIFEST, SCORES
from sharding.selection import SelectionError, select_keys
from sharding.tables import part_name, read_parts, schema_mismatch, write_part

A, B, C = "a" * 16, "b" * 16, "c" * 16


@pytest.fixture
def scanned(workspace):
    rows = [{"key": key, "status": "kept", "source": "s", "path": key} for key in (A, B, C)]
    write_part(workspace.manifest / part_name(0), pa.Table.from_pylist(rows, schema=MANIFEST), made_from="x")
    write_part(workspace.kept / part_name(0), pa.Table.from_pylist(rows, schema=MANIFEST), made_from="x")
    return workspace


def rows(workspace):
    return [tuple(row.values()) for row in read_decisions(workspace).table.to_pylist()]


def test_later_rows_replace_earlier_ones_and_forget_takes_back(scanned):
    first = parse_decisions(f"key,decision,who,why\n{A},drop,me,ugly\n{B},keep,me,\n{A},keep,you,no\n", name="x.csv")
    report = add_decisions(scanned, first)
    assert (report.num_rows, report.num_changed, report.num_total) == (2, 2, 2)
    assert rows(scanned) == [(A, "keep", "you", "no"), (B, "keep", "me", "")]
    assert schema_mismatch(read_decisions(scanned).table, DECISIONS) == ""

    report = add_decisions(scanned, parse_decisions(f"decision,key\nforget,{A}\nforget,{C}\nkeep,{B}\n", name="x.csv"))

    assert (report.num_rows, report.num_changed, report.num_total) == (3, 2, 1)
    assert rows(scanned) == [(B, "keep", "", "")]


def test_the_same_decisions_again_change_nothing(scanned):
    added = make_decisions(pa.array([B, A]), decision="drop", who="me", why="x")
    add_decisions(scanned, added)
    path = scanned.decisions / part_name(0)
    before = path.read_bytes(), path.stat().st_mtime_ns

    report = add_decisions(scanned, added)

    assert report.num_changed == 0 and (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_every_mistake_is_told_with_its_line_and_nothing_is_added(scanned):
    text = f'key,decision,why\n{A},drop,"two\nlines"\nXYZ,drop,\n{B},delete,\n{C},keep\n'

    with pytest.raises(DecisionError) as caught:
        parse_decisions(text, name="x.csv")

    assert [line.split(": ")[0] for line in str(caught.value).split("\n")] == ["x.csv:4", "x.csv:5", "x.csv:6"]
    assert "keep, drop, not_a_duplicate, preferred_keeper or forget" in str(caught.value)
    assert rows(scanned) == []


@pytest.mark.parametrize("text", ["", "key\n", "key,decision,colour\n", "key,key,decision\n"])
def test_a_wrong_first_line_is_refused(text):
    with pytest.raises(DecisionError, match="the first line must be"):
        parse_decisions(text, name="x.csv")


def test_unknown_keys_are_a_warning_and_stay(scanned):
    unknown = "f" * 16

    report = add_decisions(scanned, make_decisions(pa.array([A, unknown]), decision="keep", who="", why=""))

    assert report.unknown_keys == (unknown,) and "warning: 1 keys" in report.summary()
    assert len(rows(scanned)) == 2


def test_what_is_exported_imports_unchanged(scanned, tmp_path):
    why = 'a "quoted", reason\nover two lines'
    add_decisions(scanned, make_decisions(pa.array([A]), decision="drop", who="ü", why=why))
    before = rows(scanned)

    export_decisions(scanned, tmp_path / "out.csv")
    text = (tmp_path / "out.csv").read_text(encoding="utf-8")
    (scanned.decisions / part_name(0)).unlink()
    add_decisions(scanned, parse_decisions(text, name="out.csv"))

    assert rows(scanned) == before


def test_a_wrong_key_or_decision_on_the_command_line_is_refused():
    with pytest.raises(DecisionError, match="must be one of keep"):
        make_decisions(pa.array([A]), decision="kep", who="", why="")
    with pytest.raises(ValueError, match="is no key"):
        make_decisions(pa.array(["abc"]), decision="keep", who="", why="")


# --- selection ---


@pytest.fixture
def scored(scanned):
    table = pa.Table.from_pylist(
        [{"key": key, "score": score, "status": "ok"} for key, score in ((A, 0.1), (B, 0.9))], schema=SCORES
    )
    write_part(scanned.annotations("aes-b32.v1") / part_name(0), table, made_from="x")
    return scanned


def test_a_condition_sees_the_manifest_and_every_score(scored):
    assert select_keys(scored, "score_aes_b32_v1 < 0.5").to_pylist() == [A]
    assert select_keys(scored, f"score_aes_b32_v1 is null and path = '{C}'").to_pylist() == [C]
    assert select_keys(scored, "true -- all").to_pylist() == [A, B, C]


def test_a_wrong_condition_lists_the_columns(scored):
    with pytest.raises(SelectionError, match=r"colour.*columns: key, dataset, .*tags_meta.*score_aes_b32_v1"):
        select_keys(scored, "colour = 'red'")
    with pytest.raises(SelectionError, match="--where"):
        select_keys(scored, "score_aes_b32_v1 <")


# --- the commands, with dedupe ---


def test_dedupe_does_what_was_decided_and_undecided(run, tmp_path, capsys):
    config, options = str(tmp_path / "test.toml"), ["--workspace", str(tmp_path / "ws")]
    run("scan")
    run("dedupe")
    folder = tmp_path / "ws" / "dedupe" / "kept"
    key = read_parts(folder, ["key"]).column("key")[0].as_py()

    assert cli.main(["decide", "drop", config, key, *options, "--who", "me", "--why", "blurred", "--dry-run"]) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert run("dedupe")[1].endswith("everything is current\n")
    assert cli.main(["decide", "drop", config, "--where", f"key = '{key}'", *options, "--who", "me"]) == 0
    assert cli.main(["decisions", "export", config, str(tmp_path / "out.csv"), *options]) == 0
    code, out = run("dedupe")

    assert code == 0 and "dropped_by_decision" in out
    assert key not in read_parts(folder, ["key"]).column("key").to_pylist()
    drops = read_parts(tmp_path / "ws" / "dedupe" / "drops").to_pylist()
    assert {(row["reason"], row["detail"]) for row in drops if row["key"] == key} == {
        ("dropped_by_decision", f"me: key = '{key}'")
    }
    assert run("report")[0] == 0  # it adds up

    (tmp_path / "forget.csv").write_text(f"key,decision\n{key},forget\n")
    assert cli.main(["decisions", "import", config, str(tmp_path / "forget.csv"), *options]) == 0
    run("dedupe")
    assert key in read_parts(folder, ["key"]).column("key").to_pylist()


def test_keys_and_a_condition_at_once_are_refused(run, tmp_path, capsys):
    config, options = str(tmp_path / "test.toml"), ["--workspace", str(tmp_path / "ws")]
    run("scan")

    assert cli.main(["decide", "drop", config, *options]) == 2
    assert cli.main(["decide", "drop", config, A, "--where", "true", *options]) == 2
    assert "either keys or --where" in capsys.readouterr().err


def test_many_decisions_are_quick(scanned):
    numbers = np.arange(200_000, dtype=np.uint64)
    from sharding.keys import key_texts

    report = add_decisions(scanned, make_decisions(key_texts(numbers), decision="drop", who="a", why="b"))

    assert report.num_total == 200_000
