"""Shards that are elsewhere, damaged or cut short, and a loader worker that is killed, in real launches."""

import json
import os
import shutil
import signal

import pytest

from sharding.chunk import open_chunk

pytestmark = pytest.mark.slow

FIRST, SECOND = "real/0000", "real/0001"


def last_exit(run) -> int:
    return json.loads((run.root / "last_exit.json").read_text())["code"]


def losses(run):
    return [row["train/loss"] for row in run.rows("metrics.jsonl")]


def kill_a_worker_once() -> None:
    """In the training process: after its second batch, a loader's workers are killed as by the kernel."""
    from training.loading.workers import Loader

    give = Loader.__next__
    given = []

    def give_and_kill(self):
        batch = give(self)
        given.append(batch)
        if len(given) == 2:
            for pid in self.worker_pids:
                os.kill(pid, signal.SIGKILL)
        return batch

    Loader.__next__ = give_and_kill


def test_a_remote_workspace_trains_what_a_local_one_does(make_run, real_workspace, uninterrupted, tmp_path):
    here = tmp_path / "here"
    run = make_run(tmp_path / "run", f"data.workspace='{here}'", f"data.remote='file://{real_workspace}'")

    assert run.train("--chunks", ":") == 0, run.log.read_text()

    assert losses(run) == losses(uninterrupted)
    assert run.final_files(SECOND) == uninterrupted.final_files(SECOND)
    assert len(list(here.glob("chunks/real/*/*.tar"))) == 4


def test_a_killed_worker_changes_nothing_of_what_is_trained(make_run, uninterrupted, tmp_path):
    run = make_run(tmp_path / "run", "data.workers=1", "data.prefetch=1")

    assert run.train("--chunk", FIRST, prepare=kill_a_worker_once) == 0, run.log.read_text()

    assert "SIGKILL" in run.log.read_text()
    assert run.final_files(FIRST) == uninterrupted.final_files(FIRST)


@pytest.mark.parametrize("damage", ["flipped", "cut short"])
def test_a_damaged_shard_ends_the_launch_with_code_3_and_its_name(make_run, real_workspace, tmp_path, damage):
    workspace = shutil.copytree(real_workspace, tmp_path / "workspace")
    run = make_run(tmp_path / "run", f"data.workspace='{workspace}'")
    chunk = open_chunk(workspace / "chunks" / FIRST)
    row = chunk.read_index().to_pylist()[-1]
    path = chunk.shard_path(row["shard"])
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[row["image_offset"] + row["image_bytes"] // 2] ^= 1
    path.write_bytes(content if damage == "flipped" else content[: len(content) // 2])

    assert run.train("--chunk", FIRST) == 3

    (line,) = run.errors()
    assert path.name in line
    assert last_exit(run) == 3
