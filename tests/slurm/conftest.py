"""A private Slurm for the tests of this folder, and a small dataset; started once, stopped at the end."""

import getpass
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts import start_slurm


@pytest.fixture(scope="session", autouse=True)
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Start Slurm, let SLURM_CONF point at it, and return its folder."""
    if missing := start_slurm.missing_programs():
        pytest.skip(f"{', '.join(missing)}: not installed (apt-get install slurm-wlm munge)")
    folder = tmp_path_factory.mktemp("slurm")
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(start_slurm.start(folder))
    try:
        yield folder
    finally:
        start_slurm.stop(folder)
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before


@pytest.fixture(autouse=True)
def empty_queue(slurm: Path) -> Iterator[None]:
    """Cancel what a test leaves behind."""
    yield
    subprocess.run(["scancel", f"--user={getpass.getuser()}"], check=True)


@pytest.fixture(scope="session")
def wait_for_queue() -> Callable[..., None]:
    """Return a function that waits until no job of the names given (default: any) is in the queue."""

    def wait(*job_ids: str, timeout_seconds: float = 200) -> None:
        command = ["squeue", "--noheader", "--format=%i %j %T %r"]
        deadline = time.monotonic() + timeout_seconds
        while rest := [
            line
            for line in subprocess.check_output(command, text=True).splitlines()
            if not job_ids or line.split("_")[0].split()[0] in job_ids
        ]:
            assert time.monotonic() < deadline, rest
            time.sleep(0.1)

    return wait


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the TOML of twelve small pictures in three parts; no models."""
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "raw").mkdir()
    for seed in range(12):
        noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((96, 72), Image.Resampling.BICUBIC).save(folder / "raw" / f"{seed:02d}.png")
    path = folder / "small.toml"
    path.write_text(
        f'name = "small"\npart_size = 4\n[sources.photos]\nroot = "{folder / "raw"}"\n[filters]\nmin_pixels = 1\n'
        '[plan]\nchunk_size = 5\n[pack]\nshard_size = 2\n[policies.default]\ngroups = ["rest"]\n'
    )
    return path
