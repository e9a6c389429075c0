"""`status --watch`: on a terminal, in a log, for a run that comes later, with a queue, until Ctrl-C."""

import io
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.bench.simulated_run import chunk_names
from training.cli import main
from training.status_queue import QueueReader, folder_digest
from training.status_watch import Watcher, screen, watch

NAMES = chunk_names(12)
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def without_queue(monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def make_squeue(folder, script):
    path = folder / "bin" / "squeue"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


def test_the_screen_has_progress_speed_time_left_and_events(run_dir):
    text = "\n".join(screen(Watcher(run_dir.root).look(), now=0.0))

    assert "simulated (run-" in text and "1970-01-01 00:00:00 UTC" in text
    assert "campaign [##################............]  58.3%  7 of 12 chunks" in text
    assert f"chunk    [###############...............]  50.0%  {NAMES[7]}, step 20 of 40, saved up to 0" in text
    assert "images/s" in text and "2,000 images" in text and "exit     75" in text
    assert "3 chunks superseded: rewound" in text and "state saved" not in text
    assert "queue" not in text


def test_a_terminal_is_redrawn_in_place_and_gets_its_cursor_back(run_dir):
    out, waits = io.StringIO(), []

    watch(run_dir.root, out, seconds=7, is_terminal=True, num_looks=3, sleep=waits.append)

    assert out.getvalue().count("\033[H") == 4 and out.getvalue().endswith("\033[?25h\n")
    assert waits == [7, 7]


def test_in_a_log_only_what_is_new_is_said(run_dir):
    out = io.StringIO()

    def between(_):
        if out.getvalue().count("\n") < 40:
            out.write("---\n")
            ledger = run_dir.open_ledger(guard=lambda: None)
            ledger.append("stopped", chunk=NAMES[7], global_step=290, reason="asked for")

    watch(run_dir.root, out, seconds=1, is_terminal=False, num_looks=2, sleep=between)

    before, after = out.getvalue().split("---\n")
    assert "\033" not in out.getvalue()
    assert len(before.splitlines()) == 13 and "idle  campaign 58.3%" not in after
    assert "stopped at global step 290: asked for" in after and after.splitlines()[-1].startswith("stopped  campaign")


def test_a_run_that_comes_later_or_is_damaged_for_a_moment_ends_nothing(run_dir, tmp_path):
    out, later = io.StringIO(), tmp_path / "later"
    steps = iter([lambda: run_dir.root.rename(later), lambda: (later / "run.json").write_text("{")])

    watch(later, out, seconds=1, is_terminal=False, num_looks=3, sleep=lambda _: next(steps)())

    first, *_, last = out.getvalue().splitlines()
    assert "no run was started in" in first and "campaign 58.3%" in out.getvalue() and "not valid JSON" in last


def test_the_queue_shows_the_jobs_of_this_run_only(run_dir, tmp_path):
    digest = folder_digest(run_dir.root)
    make_squeue(tmp_path, f'echo "31|RUNNING|1:02|n1|train.{digest}"; echo "32|PENDING|0:00|(Priority)|train.00000000"')

    queue = QueueReader(run_dir.root).read()

    assert queue is not None and queue.text() == "31 train RUNNING 1:02 n1"
    assert "queue    31 train RUNNING" in "\n".join(screen(Watcher(run_dir.root).look(), now=0.0))


def test_a_page_does_not_wait_for_the_queue(run_dir, tmp_path):
    make_squeue(tmp_path, f'sleep 0.5; echo "31|RUNNING|1:02|n1|train.{folder_digest(run_dir.root)}"')
    (tmp_path / "bin" / "sleep").symlink_to("/bin/sleep")
    reader = QueueReader(run_dir.root)

    assert reader.read(wait=False) is None
    deadline = time.monotonic() + 20
    while (queue := reader.read(wait=False)) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert queue is not None and queue.text() == "31 train RUNNING 1:02 n1"


def test_a_queue_that_does_not_answer_is_said(run_dir, tmp_path):
    make_squeue(tmp_path, "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")

    queue = QueueReader(run_dir.root).read()

    assert queue is not None and queue.text().endswith("Unable to contact slurm controller")


@pytest.mark.parametrize(
    "words", [["--watch", "0"], ["--watch", "--json"], ["--watch", "--verify"], ["--watch", "--set", "seed=1"]]
)
def test_what_does_not_go_with_it_is_refused(run_dir, words, capsys):
    assert main(["status", "--run-dir", str(run_dir.root), *words]) == 2
    assert "--watch" in capsys.readouterr().err


def test_ctrl_c_ends_it_with_code_0(run_dir, tmp_path):
    command = [sys.executable, "-m", "training", "status", "--run-dir", str(run_dir.root), "--watch", "0.05"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 60
        while "campaign" not in (tmp_path / "log").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)

    assert process.wait(30) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_slurm_that_is_installed_but_not_set_up_is_no_queue(run_dir, tmp_path):
    make_squeue(tmp_path, "echo 'squeue: fatal: Could not establish a configuration source' >&2; exit 1")

    assert QueueReader(run_dir.root).read() is None
