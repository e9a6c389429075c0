"""A full disk, a read-only folder, two tasks on the same part: a clear error or the right result, no damaged part.

Each stage meets each of them on a workspace that is ready for it. Whatever happens, the same command afterwards must
leave the same bytes as in a workspace where nothing went wrong.
"""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from captioning import cli as captioning_cli
from sharding import cli as sharding_cli
from sharding.files import TEMPORARY_MARK

ROOT = Path(__file__).parents[2]
STAGES = {
    "scan": ["sharding", "scan", "--workers", "0"],
    "dedupe": ["sharding", "dedupe"],
    "annotate": ["captioning", "annotate", "--workers", "0"],
    "compose": ["captioning", "compose"],
    "plan": ["sharding", "plan"],
    "pack": ["sharding", "pack", "--workers", "0"],
    "combine": ["sharding", "combine"],
}
DONE, FAILED = 0, 1


def words(stage: str, config: Path, workspace: Path) -> list[str]:
    package, command, *options = STAGES[stage]
    return [package, command, str(config), "--workspace", str(workspace), *options]


def run_stage(stage: str, config: Path, workspace: Path) -> int:
    """Run a stage in this process; its messages go to stderr."""
    package, *arguments = words(stage, config, workspace)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        return {"sharding": sharding_cli, "captioning": captioning_cli}[package].main(arguments)
    finally:
        root.handlers[:] = handlers  # a command configures the root logger, which outlives the test
        root.setLevel(level)


def contents(workspace: Path) -> dict[str, str]:
    return {
        path.relative_to(workspace).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(workspace.rglob("*"))
        if path.is_file() and path.name != "events.jsonl" and TEMPORARY_MARK not in path.name
    }


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "raw").mkdir()
    for seed in range(16):
        noise = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((288, 224), Image.Resampling.BICUBIC).save(folder / "raw" / f"{seed:02d}.png")
    (folder / "raw" / "broken.png").write_bytes(b"no picture")
    (folder / "raw" / "copy.png").write_bytes((folder / "raw" / "03.png").read_bytes())
    path = folder / "small.toml"
    path.write_text(
        f'name = "small"\npart_size = 6\nmax_broken_fraction = 0.5\n[sources.photos]\n'
        f"root = {json.dumps(str(folder / 'raw'))}\n[filters]\nmin_pixels = 1\n[plan]\nchunk_size = 6\n"
        '[pack]\nshard_size = 2\n[combine]\nchunk_size = 5\n[annotate.models.date]\nkind = "date"\n'
        '[policies.default]\ngroups = ["date", "rest"]\n[policies.default.date]\nmodel = "date"\n'
    )
    return path


@pytest.fixture(scope="module")
def before(config, tmp_path_factory) -> dict[str, Path]:
    """Return, by stage, a workspace that is ready for it; "done" is one where all have run."""
    folder = tmp_path_factory.mktemp("before")
    workspace = tmp_path_factory.mktemp("whole") / "ws"
    workspace.mkdir()
    for stage in STAGES:
        shutil.copytree(workspace, folder / stage)
        assert run_stage(stage, config, workspace) == DONE
    shutil.copytree(workspace, folder / "done")
    return {name: folder / name for name in (*STAGES, "done")}


@pytest.fixture
def expected(before) -> Callable[[str], dict[str, str]]:
    """Return a function that gives what a workspace holds after a stage."""
    names = list(before)
    return lambda stage: contents(before[names[names.index(stage) + 1]])


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """Mount a file system of 8 MB."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path, *, leave_bytes: int) -> Path:
    """Write a file that leaves so much space on the disk."""
    path = disk / "filler"
    usage = shutil.disk_usage(disk)
    with path.open("wb") as stream:
        stream.write(bytes(usage.free - leave_bytes))
    return path


@pytest.mark.parametrize("leave_kilobytes", [0, 4, 20])
@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_is_an_error_with_a_path_or_the_right_result(
    stage, leave_kilobytes, config, before, expected, small_disk, capsys, monkeypatch
):
    if leave_kilobytes > 0:  # the forecast was right, then somebody else filled the disk
        monkeypatch.setattr("sharding.pack.require_free_bytes", lambda *_: None)
    workspace = small_disk / "ws"
    shutil.copytree(before[stage], workspace)
    filler = fill(small_disk, leave_bytes=leave_kilobytes * 1024)

    code = run_stage(stage, config, workspace)

    message = capsys.readouterr().err
    if code == DONE:
        assert leave_kilobytes > 0
        assert contents(workspace) == expected(stage)
        return
    assert code == FAILED, message
    assert str(workspace) in message, message
    assert "disk full" in message or "are free there" in message, message
    assert "Traceback" not in message

    filler.unlink()
    assert run_stage(stage, config, workspace) == DONE
    assert contents(workspace) == expected(stage)
    for line in (workspace / "events.jsonl").read_text().splitlines():
        json.loads(line)  # half a line would be a line that no program can read


@pytest.mark.parametrize("stage", STAGES)
def test_a_read_only_workspace_is_an_error_with_a_path(stage, config, before, expected, small_disk, capsys):
    workspace = small_disk / "ws"
    shutil.copytree(before[stage], workspace)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)

    code = run_stage(stage, config, workspace)

    message = capsys.readouterr().err
    assert code == FAILED, message
    assert str(workspace) in message, message
    assert "Read-only file system" in message
    assert "Traceback" not in message

    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert run_stage(stage, config, workspace) == DONE
    assert contents(workspace) == expected(stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_two_tasks_on_the_same_part_at_once_give_the_same_bytes(stage, config, before, expected, tmp_path):
    workspace = tmp_path / "ws"
    shutil.copytree(before[stage], workspace)
    command = [sys.executable, "-m", *words(stage, config, workspace)]

    tasks = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    messages = [task.communicate(timeout=120)[1] for task in tasks]

    assert [task.returncode for task in tasks] == [DONE, DONE], "\n".join(messages)
    assert contents(workspace) == expected(stage)
