"""On Windows everything can be imported and nothing is run: a process without what Windows has not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
AS_ON_WINDOWS = """
import importlib, os, pkgutil, signal, sys
for name in {libraries!r}:  # what asks for the platform itself is imported before it changes
    importlib.import_module(name)

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name in {{"fcntl", "resource", "pwd", "grp", "termios", "tty"}}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty"):
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Hidden())
for module, names in (
    (os, "pread fork getuid geteuid sched_getaffinity statvfs posix_fadvise killpg getpgid setsid mkfifo uname"),
    (signal, "SIGUSR1 SIGUSR2 SIGALRM SIGKILL SIGHUP pthread_sigmask sigtimedwait setitimer alarm sigwait"),
):
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
sys.platform = "win32"
"""
LIGHT = [
    "asyncio", "argparse", "logging", "multiprocessing.pool", "numpy", "PIL.Image", "psutil", "pyarrow.compute",
    "pyarrow.parquet", "pydantic", "subprocess", "concurrent.futures.process",
]  # fmt: skip
HEAVY = [
    "torch", "torch.utils.data", "transformers", "accelerate", "diffusers", "numba", "duckdb",
    "multiprocessing.forkserver",
]  # fmt: skip


def on_windows(code, *, libraries):
    """Run code in a process that looks like one on Windows; return what it prints to either stream, and its code."""
    script = AS_ON_WINDOWS.format(libraries=libraries) + code
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300, env=environment
    )
    return done.stdout, done.stderr, done.returncode


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("training.cli", ["run", "run.toml", "--run-dir", "run"]),
        ("training.cli", ["doctor-launch", "run.toml", "--run-dir", "run"]),
        ("sharding.cli", ["scan", "dataset.toml"]),
        ("captioning.cli", ["annotate", "dataset.toml"]),
    ],
)
def test_on_windows_a_command_says_one_line_that_names_wsl2(module, arguments):
    code = f"import importlib\nsys.exit(importlib.import_module({module!r}).main({arguments!r}))"

    _, errors, exit_code = on_windows(code, libraries=LIGHT)

    assert exit_code == 2, errors
    assert len(errors.splitlines()) == 1
    assert "WSL2" in errors


def test_on_windows_help_works_and_shards_and_tars_are_read_by_offset(tmp_path):
    code = f"""
import tarfile
from pathlib import Path
from sharding.files import locked, write_bytes
from sharding.shards import ShardReader
from sharding.sources import read_file
folder = Path({str(tmp_path)!r})
write_bytes(folder / "member", b"abcdef")
with tarfile.open(folder / "a.tar", "w") as tar:
    tar.add(folder / "member", arcname="member")
with locked(folder):
    print(ShardReader().read(folder / "member", 2, 3), read_file(folder / "a.tar" / "member"))
import training.cli
training.cli.main(["run", "--help"])
"""

    text, errors, exit_code = on_windows(code, libraries=LIGHT)

    assert exit_code == 0, errors
    assert text.startswith("b'cde' b'abcdef'")
    assert "usage: python -m training run" in text
    assert "no locks on Windows" in errors


@pytest.mark.slow
def test_on_windows_every_module_can_be_imported():
    code = """
for package in ("sharding", "captioning", "training"):
    for found in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
"""

    _, errors, exit_code = on_windows(code, libraries=[*LIGHT, *HEAVY])

    assert exit_code == 0, errors[-2000:]
