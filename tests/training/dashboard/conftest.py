"""A simulated run of twelve chunks, small enough for every test."""

import pytest

from scripts.bench.simulated_run import Simulation, simulate_run
from training.dashboard.view import RunView

EVIL = '<script>document.title="broken in"</script><img src=x onerror=alert(1)>'


@pytest.fixture
def run_dir(tmp_path):
    simulation = Simulation(
        num_chunks=12, num_done=7, steps_per_chunk=40, images_per_chunk=400, preview_every=3, picture_side=24,
        prompts=(f"1girl, {EVIL}", "scenery"),
    )  # fmt: skip
    return simulate_run(tmp_path / "run", simulation)


@pytest.fixture
def view(run_dir):
    return RunView(run_dir.root)
