"""kill -9 at any moment of any stage, then the same command again: the same bytes as without a kill.

For each kill a workspace is put back to just before a stage, the stage is killed, run again, and compared file by
file with an unbroken run's. Half of the kills come at a random time, half at a random change of the workspace: the
moments between two writes are what can break.

    make test-kills            50 kills; KILLS and SEED in the environment choose others
"""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from scripts.demo_models.captioning import make_tagger
from sharding.files import TEMPORARY_MARK

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "scripts" / "demo_pictures"
STAGES = {
    "scan": ["sharding", "scan", "--workers", "2"],
    "dedupe": ["sharding", "dedupe"],
    "annotate": ["captioning", "annotate", "--workers", "1"],
    "compose": ["captioning", "compose"],
    "plan": ["sharding", "plan"],
    "pack": ["sharding", "pack", "--workers", "2"],
    "combine": ["sharding", "combine"],
}
NUM_KILLS = int(os.environ.get("KILLS", "7"))
TIMEOUT_SECONDS = 120.0


@dataclass(frozen=True)
class Unbroken:
    """How a stage went without a kill: its time, how often the workspace changed, what it left."""

    seconds: float
    num_changes: int
    contents: dict[str, str]


def start(stage: str, config: Path, workspace: Path) -> subprocess.Popen[bytes]:
    package, name, *options = STAGES[stage]
    command = [sys.executable, "-m", package, name, str(config), "--workspace", str(workspace), *options]
    with (workspace.parent / f"{stage}.log").open("wb") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def finish(stage: str, config: Path, workspace: Path) -> None:
    process = start(stage, config, workspace)
    assert process.wait(TIMEOUT_SECONDS) == 0, (workspace.parent / f"{stage}.log").read_text()


def names_and_sizes(workspace: Path) -> set[tuple[str, int]]:
    """Return what can be seen of a workspace from outside, while it is written to."""
    seen = set()
    for folder, _, names in os.walk(workspace):
        for name in names:
            path = Path(folder, name)
            try:
                seen.add((str(path), path.stat().st_size))
            except FileNotFoundError:
                continue
    return seen


def watch(process: subprocess.Popen[bytes], workspace: Path, stop: Callable[[float, int], bool]) -> tuple[bool, int]:
    """Wait until the process ends or `stop(seconds, changes so far)`; return whether it is at work, and the changes."""
    started, seen, num_changes = time.monotonic(), names_and_sizes(workspace), 0
    while process.poll() is None:
        now = names_and_sizes(workspace)
        num_changes += now != seen
        seen = now
        if stop(time.monotonic() - started, num_changes):
            return True, num_changes
        assert time.monotonic() - started < TIMEOUT_SECONDS
        time.sleep(0.001)
    return False, num_changes


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a command with SIGKILL. Its workers end by themselves."""
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive, "workers outlive a killed command"


def contents(workspace: Path) -> dict[str, str]:
    return {
        path.relative_to(workspace).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(workspace.rglob("*"))
        if path.is_file() and path.name != "events.jsonl" and TEMPORARY_MARK not in path.name
    }


def put_back(before: Path, workspace: Path) -> None:
    shutil.rmtree(workspace, ignore_errors=True)
    shutil.copytree(before, workspace)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    for source in ("photos", "wallpapers", "pixiv"):
        shutil.copytree(PICTURES / source, folder / "raw" / source)
    tagger = make_tagger(folder / "tagger", seed=1)
    sources = "".join(
        f'[sources.{name}]\nroot = {json.dumps(str(folder / "raw" / name))}\nimporter = "{importer}"\n'
        for name, importer in (("photos", "folder"), ("wallpapers", "booru"), ("pixiv", "pixiv"))
    )
    path = folder / "demo.toml"
    path.write_text(
        f'name = "demo"\npart_size = 8\nmax_broken_fraction = 0.5\n{sources}[filters]\nmin_pixels = 1000\n'
        "[plan]\nchunk_size = 8\n[pack]\nshard_size = 3\n[combine]\nchunk_size = 9\n"
        f'[annotate.models.wd]\nkind = "wd_tagger"\nmodel = {json.dumps(str(tagger))}\n'
        '[annotate.models.date]\nkind = "date"\n'
        '[policies.default]\ngroups = ["date", "rating", "rest"]\n[policies.default.date]\n'
        '[policies.default.tags]\ntagger = "wd"\n'
    )
    return path


@pytest.mark.slow
@pytest.mark.timeout(300 + 60 * NUM_KILLS)  # a stage and its repetition, on a busy machine
def test_kill_9_anywhere_and_the_same_command_again_give_the_same_bytes(config, tmp_path):
    workspace = tmp_path / "work" / "workspace"
    workspace.mkdir(parents=True)
    unbroken: dict[str, Unbroken] = {}
    for stage in STAGES:
        shutil.copytree(workspace, tmp_path / "before" / stage)
        started = time.monotonic()
        process = start(stage, config, workspace)
        _, num_changes = watch(process, workspace, lambda seconds, changes: False)
        assert process.returncode == 0, (workspace.parent / f"{stage}.log").read_text()
        unbroken[stage] = Unbroken(time.monotonic() - started, num_changes, contents(workspace))
    verify = [sys.executable, "-m", "sharding", "verify", str(config), "--workspace", str(workspace)]
    assert subprocess.run(verify, cwd=ROOT, capture_output=True, timeout=TIMEOUT_SECONDS).returncode == 0

    seed = int(os.environ.get("SEED", random.randrange(10**6)))
    print(f"SEED={seed} chooses the moments of the kills")
    moments = random.Random(seed)
    num_killed = dict.fromkeys(STAGES, 0)
    num_tries = 0
    while sum(num_killed.values()) < NUM_KILLS:
        assert num_tries < 3 * NUM_KILLS, f"most kills came too late: {num_killed}"
        stage = list(STAGES)[num_tries % len(STAGES)]
        num_tries += 1
        put_back(tmp_path / "before" / stage, workspace)
        # the first third is mostly imports, in which nothing can break
        at_seconds = unbroken[stage].seconds * moments.uniform(0.3, 1.0)
        at_change = moments.randint(1, unbroken[stage].num_changes)
        if moments.random() < 0.5:
            at_seconds = TIMEOUT_SECONDS
        else:
            at_change = 10**9

        process = start(stage, config, workspace)
        is_at_work, num_changes = watch(
            process, workspace, lambda seconds, changes, s=at_seconds, c=at_change: seconds >= s or changes >= c
        )
        if is_at_work:
            kill(process)
            num_killed[stage] += 1
            print(f"{stage} killed after {num_changes} of about {unbroken[stage].num_changes} changes")
        finish(stage, config, workspace)

        assert contents(workspace) == unbroken[stage].contents, f"{stage}, SEED={seed}, try {num_tries}"
    print(f"killed: {num_killed}")


def test_what_a_pack_killed_right_after_its_commit_leaves_is_removed_later(run, write_captions, tmp_path):
    for stage in ("scan", "dedupe"):
        run(stage)
    write_captions()
    for stage in ("plan", "pack"):
        run(stage)
    chunk = tmp_path / "ws" / "chunks" / "photos" / "0000"
    packed = contents(tmp_path / "ws")
    (chunk / ".checked").unlink()
    (chunk / ".building").mkdir()
    left_over = [chunk / ".building" / "shard-00000.parquet", chunk / "shard-00000-0123456789ab.tar"]
    left_over.append(tmp_path / "ws" / "pack_drops" / "photos-0000.parquet")
    for path in left_over:
        path.parent.mkdir(exist_ok=True)
        path.touch()

    run("pack")

    assert contents(tmp_path / "ws") == packed
