"""A run is proved from its own records, and every input that is tampered with is found."""

import json
import re
import shutil

import pytest

from sharding.files import digest_of
from tests.training.conftest import RUN_TOML, make_chunk
from tests.training.paper_run import PaperRun
from training.cli import main
from training.status import read_status, status_text
from training.verify_run import verify_run

BAD = f"{3:016x}"
"""An image of made/0000."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two chunks of four images in two epochs, one step skipped, one image broken, then a third epoch."""

    root = tmp_path_factory.mktemp("paper")
    for number in range(2):
        make_chunk(root / "workspace", number)
    toml = root / "run.toml"
    toml.write_text(RUN_TOML.format(workspace=root / "workspace").replace("batch_size = 4", "batch_size = 2"))
    run = PaperRun(toml, root / "run", "data.epochs=2", skip=(2,), broken=(BAD,))
    run.train_all()
    run.config = run.config.model_copy(update={"data": run.config.data.model_copy(update={"epochs": 3})})
    run.train_all()
    return run


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of the run's folder to tamper with."""
    shutil.copytree(trained.run_dir.root, tmp_path / "run")
    return tmp_path / "run"


def test_a_run_that_is_right_is_proved_with_its_skipped_and_broken_images(trained):
    proof = verify_run(trained.config, trained.run_dir.root)

    assert proof.problems == [] and proof.notes == []
    assert (proof.planned, proof.num_chunks, proof.left) == (24, 2, 0)
    assert [one.key for one in proof.broken] == [BAD] * 3
    assert {one.reason for one in proof.broken} == {"truncated"}
    assert {(one.chunk, one.global_step) for one in proof.skipped} == {("made/0000", 2)}
    assert proof.trained + len(proof.skipped) + len(proof.broken) == 24
    assert proof.num_traced_steps == 12
    assert "everything adds up" in proof.text()
    json.dumps(proof.values())


def rewrite_ledger(path, change):
    """Change lines' fields and forge the chain anew, as someone would who knows how it is made."""
    lines = [json.loads(raw) for raw in path.read_text().splitlines()]
    lines = [line for line in lines if change(line) is not False]
    previous, out = "0" * 64, []
    for number, line in enumerate(lines):
        body = {name: line[name] for name in ("time", "event", "fields")}
        body = {"number": number, **body, "previous": previous}
        previous = digest_of(body)
        out.append(json.dumps({**body, "hash": previous}, ensure_ascii=False))
    path.write_text("".join(f"{raw}\n" for raw in out))


def set_field(event, name, value, *, last=False):
    def tamper(root):
        found = []

        def change(line):
            if line["event"] == event and (not found or last):
                found.append(line)
            return

        rewrite_ledger(root / "ledger.jsonl", change)
        chosen = len(found)
        seen = []

        def act(line):
            if line["event"] == event:
                seen.append(1)
                if len(seen) == chosen:
                    line["fields"][name] = value(line["fields"][name])
            return

        rewrite_ledger(root / "ledger.jsonl", act)

    return tamper


def drop_event(event):
    return lambda root: rewrite_ledger(root / "ledger.jsonl", lambda line: line["event"] != event)


def edit_rows(name, change):
    def tamper(root):
        rows = [json.loads(raw) for raw in (root / name).read_text().splitlines()]
        rows = change(rows)
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    return tamper


def edit_json(name, **values):
    def tamper(root):
        path = root / "chunks" / "made" / "0001" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return tamper


def flip_index(root):
    path = root / "chunks" / "made" / "0000" / "index.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def other_images(rows):
    rows[4]["samples"][0][0] = "f" * 16
    return rows


def other_seen(rows):
    rows[5]["train/images_seen"] += 1
    return rows


TAMPERINGS = {
    "index": (flip_index, "index.parquet: damaged"),
    "chunk.json": (edit_json("chunk.json", index_sha256="0" * 64), "digest of the chunk|damaged"),
    "complete.json": (edit_json("complete.json", images_trained=7), "complete.json has another images_trained"),
    "complete.json missing": (
        lambda root: (root / "chunks/made/0001/complete.json").unlink(), "complete.json is missing",
    ),
    "plan digest": (set_field("started", "plan_digests", lambda v: ["0" * 64, *v[1:]]), "digests of the batch plans"),
    "images planned": (set_field("started", "images_planned", lambda v: v + 1, last=True), "images planned"),
    "steps": (set_field("started", "steps", lambda v: v - 1, last=True), "steps: the ledger says"),
    "images trained": (set_field("state_saved", "images_trained", lambda v: v + 1), "images trained at global step"),
    "updates": (set_field("chunk_done", "applied_updates", lambda v: v - 1, last=True), "updates at global step"),
    "skipped line gone": (drop_event("skipped"), "images trained at global step"),
    "broken line gone": (drop_event("broken"), "images trained at global step"),
    "skipped keys": (set_field("skipped", "keys", lambda v: ["x", *v[1:]]), "other keys than planned"),
    "broken keys": (set_field("broken", "keys", lambda v: ["x"]), "other keys than planned"),
    "skipped elsewhere": (set_field("skipped", "global_step", lambda v: 3), "where its plan has another step"),
    "metrics row gone": (edit_rows("metrics.jsonl", lambda rows: rows[:3] + rows[4:]), "where step 4 is due"),
    "metrics row twice": (edit_rows("metrics.jsonl", lambda rows: rows[:3] + rows[2:]), "where step 4 is due"),
    "metrics cut": (edit_rows("metrics.jsonl", lambda rows: rows[:-2]), "ends before global step 11"),
    "images seen": (edit_rows("metrics.jsonl", other_seen), "images seen, skipped, broken"),
    "trace images": (edit_rows("trace.jsonl", other_images), "other images than planned"),
    "trace row twice": (edit_rows("trace.jsonl", lambda rows: rows[:3] + rows[2:]), "stands there twice"),
    "newest state gone": (
        lambda root: shutil.rmtree(root / "chunks/made/0001/final"), "newest state of the ledger is not there",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERINGS)
def test_what_was_tampered_with_is_found(trained, copy, name):
    tamper, message = TAMPERINGS[name]
    tamper(copy)

    proof = verify_run(trained.config, copy)

    assert any(re.search(message, problem) for problem in proof.problems), proof.text()


def test_the_command_ends_with_3_when_something_does_not_add_up(trained, copy, capsys):
    toml = copy / "run.toml"
    shutil.copy(trained.run_dir.root.parent / "run.toml", toml)
    settings = ["--set", "data.epochs=3"]

    right = main(["status", "--verify", "--run-dir", str(copy), *settings])
    (copy / "metrics.jsonl").unlink()
    wrong = main(["status", "--verify", "--json", "--run-dir", str(copy), *settings])

    assert (right, wrong) == (0, 3)
    assert "ends before global step 1" in capsys.readouterr().out


def test_lines_cut_off_the_end_show_by_the_state_they_leave(trained, copy):
    lines = (copy / "ledger.jsonl").read_text().splitlines(keepends=True)
    (copy / "ledger.jsonl").write_text("".join(lines[:-2]))

    proof = verify_run(trained.config, copy)

    assert proof.problems or "not in the ledger yet" in proof.text()


def test_status_of_a_trained_run(trained):
    status = read_status(trained.config, trained.run_dir.root)
    text = status_text(status)

    assert [(row.name, row.done, row.remaining) for row in status.images] == [("cats", 6, 0), ("dogs", 2, 0)]
    assert [(row.name, row.total) for row in status.periods] == [("mid", 8)]
    assert status.devices == ("1 x paper",) and status.live is None
    assert "nothing is left to train" in text and "all chunks are done" in text
