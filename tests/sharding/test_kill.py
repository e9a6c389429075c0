"""kill -9 at any moment of any stage, then the same command again: the same bytes as without a kill."""

import hashlib
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pytest

from sharding.files import TEMPORARY_MARK
from sharding.schema import CAPTIONS, Workspace
from sharding.tables import part_name, read_parts, write_part

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "scripts" / "demo_pictures"
STAGES = ("scan", "dedupe", "plan", "pack", "combine")
KILLS_PER_STAGE = 2


def command(stage: str, config: Path, workspace: Path) -> list[str]:
    workers = ["--workers", "2"] if stage in ("scan", "pack") else []
    return [sys.executable, "-m", "sharding", stage, str(config), "--workspace", str(workspace), *workers]


def caption(workspace: Workspace) -> None:
    keys = read_parts(workspace.kept, ["key"]).column("key").to_pylist()
    rows = [{"key": key, "text": f"picture {key}", "groups": []} for key in keys]
    write_part(workspace.captions("default") / part_name(0), pa.Table.from_pylist(rows, schema=CAPTIONS), made_from="x")


def kill_at(arguments: list[str], seconds: float) -> bool:
    """Start a command and kill it after some time; return whether it was still at work. Its workers end, too."""
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(timeout=seconds)
        return False
    except subprocess.TimeoutExpired:
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive, "workers outlive a killed command"
    return True


def contents(workspace: Path) -> dict[str, str]:
    return {
        path.relative_to(workspace).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(workspace.rglob("*"))
        if path.is_file() and path.name != "events.jsonl" and TEMPORARY_MARK not in path.name
    }


@pytest.mark.slow
def test_kill_9_anywhere_and_the_same_commands_again_give_the_same_bytes(tmp_path):
    for source in ("photos", "wallpapers", "pixiv"):
        shutil.copytree(PICTURES / source, tmp_path / "raw" / source)
    config = tmp_path / "demo.toml"
    sources = "".join(
        f'[sources.{name}]\nroot = {json.dumps(str(tmp_path / "raw" / name))}\nimporter = "{importer}"\n'
        for name, importer in (("photos", "folder"), ("wallpapers", "booru"), ("pixiv", "pixiv"))
    )
    config.write_text(
        f'name = "demo"\npart_size = 8\nmax_broken_fraction = 0.5\n{sources}[filters]\nmin_pixels = 1000\n'
        "[plan]\nchunk_size = 8\n[pack]\nshard_size = 3\n[combine]\nchunk_size = 9\n"
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    duration = {}
    for stage in STAGES:
        started = time.monotonic()
        subprocess.run(command(stage, config, whole), cwd=ROOT, check=True, capture_output=True)
        duration[stage] = time.monotonic() - started
        if stage == "dedupe":
            caption(Workspace(whole))

    seed = random.randrange(10**6)
    print(f"moments of the kills come from seed {seed}")
    moments = random.Random(seed)
    num_killed = 0
    for stage in STAGES:
        for _ in range(KILLS_PER_STAGE):
            # the first third is mostly imports, in which nothing can break
            num_killed += kill_at(command(stage, config, broken), duration[stage] * moments.uniform(0.3, 1.0))
        subprocess.run(command(stage, config, broken), cwd=ROOT, check=True, capture_output=True)
        if stage == "dedupe":
            caption(Workspace(broken))

    assert num_killed >= len(STAGES)
    assert contents(broken) == contents(whole)
    assert not list((broken / "chunks").rglob(f"*{TEMPORARY_MARK}*"))
    verify = subprocess.run(command("verify", config, broken), cwd=ROOT, capture_output=True, text=True)
    assert (verify.returncode, verify.stdout) == (0, "no problems\n")
