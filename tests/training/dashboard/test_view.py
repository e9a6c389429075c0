"""What the page is told: states of chunks, header, previews, disk; and damage in words."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from scripts.bench.simulated_run import chunk_names
from training.cli import main
from training.dashboard.ledger_lines import LedgerLines
from training.dashboard.overview import RunNotThereError
from training.dashboard.view import SPANS, RunView
from training.dreambooth.verdict.remedies import Remedy
from training.dreambooth.verdict.report import Verdict
from training.dreambooth.verdict.rule import Reading
from training.ledger import EVENTS, LedgerError, Line, read_ledger
from training.lock import RunLock
from training.status_events import event_text

NAMES = chunk_names(12)


def states(view):
    chunks = [chunk for group in view.overview()["groups"] for chunk in group["chunks"]]
    return {chunk["name"]: chunk["state"] for chunk in chunks}


def test_chunks_are_done_half_superseded_and_waiting_and_running_while_a_launch_is_at_work(view, run_dir):
    assert states(view) == dict(zip(NAMES, ["done"] * 7 + ["half"] + ["superseded"] * 2 + ["waiting"] * 2, strict=True))

    with RunLock.acquire(run_dir.lock_path):
        assert states(view)[NAMES[7]] == "running"
        assert view.overview()["state"] == "running"


def test_a_chunk_whose_launch_failed_is_failed(view, run_dir):
    ledger = run_dir.open_ledger(guard=lambda: None)
    ledger.append("failed", chunk=NAMES[7], global_step=290, reason="the disk is full")
    ledger.append("failed", chunk=NAMES[10], global_step=290, reason="no such picture")

    overview = view.overview()

    facts = {chunk["name"]: chunk for group in overview["groups"] for chunk in group["chunks"]}
    assert facts[NAMES[7]]["state"] == facts[NAMES[10]]["state"] == "failed"
    assert facts[NAMES[7]]["facts"]["failed"] == "the disk is full"
    assert overview["state"] == "failed"
    assert overview["sentence"] == f"{NAMES[10]}: failed at global step 290: no such picture"


def test_the_header_has_progress_speed_and_time_left(view):
    view.metrics.read_on()
    overview = view.overview()

    assert (overview["chunks_done"], overview["chunks"], overview["images"]) == (7, 12, 2800)
    assert overview["images_left"] == 5 * 400
    assert overview["chunk"] == {"name": NAMES[7], "step": 20, "steps": 40, "saved": 0}
    assert overview["done_fraction"] == pytest.approx(2800 / 4800, abs=1e-5)
    assert 30 < overview["images_per_second"] < 40 and overview["eta_seconds"] > 0
    assert overview["last_exit"]["code"] == 75
    seconds = view.read().totals.busy_seconds
    assert overview["gpu_hours"] == pytest.approx(8 * seconds / 3600, abs=1e-4)  # on 8 GPUs
    done = overview["groups"][0]["chunks"][0]["facts"]
    assert done["images"] == "400 of 400" and 0.1 < float(done["mean loss"]) < 0.2
    assert overview["ledger"][-1]["event"] == "started"


def test_curves_of_the_last_chunks_begin_there(view):
    view.metrics.read_on()

    first = {span: view.curves(span)["x"]["step"][0] for span in SPANS}

    assert first == {"all": 1, "100": 1, "10": 1, "1": 281}
    assert {"failed", "superseded"} & {mark["event"] for mark in view.curves("all")["marks"]} == {"failed"}


def test_the_disk_is_measured_and_forecast_from_a_state_that_is_there(view, run_dir):
    assert RunView(run_dir.root).disk()["text"].startswith("no forecast before the first state")
    (run_dir.final_folder(NAMES[6])).mkdir(parents=True)
    (run_dir.final_folder(NAMES[6]) / "model").write_bytes(bytes(5000))

    disk = view.disk()

    assert disk["total"] > 3 * 5000 and disk["is_enough"] and "states of" in disk["text"]


def test_a_verdict_is_told_in_words(view, run_dir):
    assert view.overview()["verdict"] is None
    reading = Reading(word="over", reasons=("the held-out loss rises",), unknown=("how like it is",))
    remedies = {"aoi": (Remedy("fewer epochs", "data.epochs=70", "new"),)}
    Verdict(
        NAMES[6], 280, {"aoi": reading}, remedies, previews=(), drift=None, drift_since=None, best=("chunks/x", 160)
    ).write(run_dir.root)

    verdict = view.overview()["verdict"]

    assert (verdict["global_step"], verdict["best_step"]) == (280, 160)
    assert verdict["concepts"] == [
        {"name": "aoi", "word": "over", "reasons": ["the held-out loss rises"], "unknown": ["how like it is"],
         "remedies": ["fewer epochs: --set 'data.epochs=70' (in a new run)"]}
    ]  # fmt: skip


def test_previews_are_listed_with_prompts_and_only_listed_ones_are_given_out(view, run_dir):
    listing = view.pictures()

    assert [step["step"] for step in listing["steps"]] == [40, 160, 280]
    picture = listing["steps"][0]["pictures"]["00"]
    assert "<script>" in listing["texts"][picture["text"]] and picture["width"] == 24
    started = list(view.read().campaign.records)
    file = view.previews.file(picture["path"], started)
    assert file is not None and file.name == "step-00000040-00.png"
    others = (
        "../run.toml",
        "newest/0000/../../../run.toml",
        "newest/9999/step-00000040-00.png",
        "newest/0000/run.toml",
    )
    for path in (*others, ""):
        assert view.previews.file(path, started) is None
    assert view.previews.small(file, height=8)[:4] == b"RIFF"


def test_a_ledger_is_read_on_and_damage_is_named(run_dir):
    lines = LedgerLines(run_dir.ledger_path)
    before = len(lines.read())
    assert before == len(read_ledger(run_dir.ledger_path))

    run_dir.open_ledger(guard=lambda: None).append("stopped", chunk=NAMES[7], global_step=290, reason="asked for")
    assert [line.event for line in lines.read()[before:]] == ["stopped"]

    whole = run_dir.ledger_path.read_bytes().splitlines(keepends=True)
    run_dir.ledger_path.write_bytes(b"".join(whole[:3] + whole[4:]))
    with pytest.raises(LedgerError, match="line 4: does not follow"):
        lines.read()
    run_dir.ledger_path.write_bytes(b"".join(whole))
    assert len(lines.read()) == before + 1


def test_every_event_has_words():
    for number, (event, names) in enumerate(EVENTS.items()):
        fields = {name: [] if name in ("chunks", "keys", "pass_over") else 1 for name in names}
        text = event_text(Line(number, "", event, fields, "", ""))
        assert text and "None" not in text.replace("None of", "")


def test_a_run_that_is_not_there_yet_is_said_so(tmp_path):
    with pytest.raises(RunNotThereError, match=r"no run was started in .*run yet"):
        RunView(tmp_path / "run").overview()


def test_a_run_that_has_only_its_settings_is_shown(view, run_dir):
    for path in (run_dir.ledger_path, run_dir.metrics_path, run_dir.run_json_path, run_dir.last_exit_path):
        path.unlink()

    overview = view.overview()

    assert (overview["state"], overview["chunks"], overview["eta_text"]) == ("idle", 0, "not known yet")
    assert json.loads(json.dumps(view.curves("all")))["x"]["step"] == []


def test_reading_writes_nothing_into_the_run(view, run_dir):
    before = {path: path.stat().st_mtime_ns for path in [run_dir.root, *run_dir.root.rglob("*")]}

    for part in view.parts().values():
        part()

    assert {path: path.stat().st_mtime_ns for path in [run_dir.root, *run_dir.root.rglob("*")]} == before


def test_the_command_writes_one_file(run_dir, tmp_path, capsys):
    assert main(["dashboard", "--run-dir", str(run_dir.root), "--html", str(tmp_path / "out" / "run.html")]) == 0
    assert main(["dashboard", "--run-dir", str(run_dir.root), "--dry-run"]) == 0
    assert main(["dashboard", "--run-dir", str(tmp_path / "none"), "--html", str(tmp_path / "x.html")]) == 2

    assert (tmp_path / "out" / "run.html").stat().st_size > 50_000 and not (tmp_path / "x.html").exists()
    assert "12 chunks" in capsys.readouterr().out


def test_many_threads_may_ask_at_once(view):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: view.overview()["num_lines"], range(40)))

    assert len(set(answers)) == 1
