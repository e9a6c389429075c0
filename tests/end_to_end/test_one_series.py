"""Five launches and three kills -9 of one run are one series in metrics.jsonl, TensorBoard and W&B, and links once."""

import signal
import time
from dataclasses import dataclass

import pytest

pytest.importorskip("wandb", reason="wandb is not installed: its offline files are what is read back")

from scripts.tiny_run import Launch
from training.wandb_file import read_history, read_links

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FIRST, SECOND = "real/0000", "real/0001"
LAUNCHES = ((FIRST, 3), (FIRST, 7), (FIRST, None), (SECOND, 14), (SECOND, None))
"""Chunk, and the step from which the launch is killed."""
ENVIRONMENT = {"WANDB_SILENT": "true", "WANDB_SERVICE": ""}
"""A test that used W&B in this process names its service there: it would take a killed launch's run to go on."""
LAST = 20
"""Two chunks of two epochs of five steps."""


@dataclass(frozen=True)
class Seen:
    """What could be read right after a launch. The series are of train/loss: (step, value)."""

    code: int
    durable_step: int
    metrics: list[tuple[int, float]]
    tensorboard: list[tuple[int, float]]
    wandb: list[tuple[int, float]]


def metrics_series(run):
    return [(row["global_step"], row["train/loss"]) for row in run.rows("metrics.jsonl") if "train/loss" in row]


def tensorboard_series(run):
    """Every event of every file, in the order of the launches: nothing hides a step that is there twice."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    files = sorted((run.root / "tensorboard").glob("events.*"), key=lambda path: path.stat().st_mtime)
    return [
        (event.step, value.tensor.float_val[0])
        for path in files
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
        if value.tag == "train/loss"
    ]


def wandb_files(run):
    return sorted((run.root / "wandb").rglob("run-*.wandb"))  # their folders' names begin with the time


def wandb_series(run):
    rows = [row for path in wandb_files(run) for row in read_history(path) if "train/loss" in row]
    assert [row["_step"] for row in rows] == [row["global_step"] for row in rows]
    return [(row["_step"], row["train/loss"]) for row in rows]


def wandb_links(run):
    return [link for path in wandb_files(run) for link in read_links(path)]


def durable_step(run):
    return max((saved["global_step"] for saved in run.events("state_saved")), default=0)


@pytest.fixture(scope="module")
def disturbed(make_run, tmp_path_factory):
    """The run, and what was seen after each launch."""
    options = ("trackers.wandb='offline'", "trackers.tensorboard=true", "preview.prompts=[]")
    run = make_run(tmp_path_factory.mktemp("one series") / "run", *options)
    seen = []
    for chunk, step in LAUNCHES:
        launch = Launch(run.arguments("run", "--chunk", chunk), run.log, environment=ENVIRONMENT)
        code = launch.wait() if step is None else launch.kill_when(lambda step=step: run.last_step() >= step)
        assert code == (0 if step is None else -signal.SIGKILL), run.log.read_text()
        series = metrics_series(run), tensorboard_series(run), wandb_series(run)
        seen.append(Seen(code, durable_step(run), *series))
    for _ in range(100):  # W&B's own process may write the end of a file after it has been closed
        if len(wandb_series(run)) >= LAST and len(wandb_links(run)) >= 2:
            break
        time.sleep(0.1)
    return run, seen


def test_five_launches_and_three_kills_are_one_rising_series_without_a_step_twice(disturbed):
    run, seen = disturbed

    steps = list(range(1, LAST + 1))
    assert [one.code for one in seen].count(-signal.SIGKILL) == 3
    assert len(run.events("started")) == len(wandb_files(run)) == 5
    assert [step for step, _ in metrics_series(run)] == steps
    assert [step for step, _ in tensorboard_series(run)] == steps
    assert wandb_series(run) == metrics_series(run)
    assert [value for _, value in tensorboard_series(run)] == pytest.approx(
        [value for _, value in metrics_series(run)], rel=1e-6
    )


def test_after_each_launch_the_trackers_hold_a_beginning_of_what_a_durable_state_covers(disturbed):
    _, seen = disturbed

    for one in seen:
        for series in (one.tensorboard, one.wandb):
            assert [step for step, _ in series] == list(range(1, len(series) + 1))
            assert len(series) <= one.durable_step <= len(one.metrics)
        assert [step for step, _ in one.metrics] == list(range(1, len(one.metrics) + 1))
    assert any(len(one.tensorboard) < len(one.metrics) for one in seen), "no kill came before a state"


def test_wandb_refers_to_the_weights_of_each_chunk_once_where_they_lie(disturbed):
    run, _ = disturbed

    links = wandb_links(run)
    assert [(link["chunk"], link["global_step"]) for link in links] == [(FIRST, 10), (SECOND, LAST)]
    assert [link["aliases"] for link in links] == [
        ["latest", "real-0000", "step-10"],
        ["latest", "real-0001", "step-20"],
    ]
    assert len({link["name"] for link in links}) == 1
    for link in links:
        folder = run.root / "chunks" / link["chunk"] / "weights"
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert link["references"] == {path.relative_to(folder).as_posix(): path.as_uri() for path in files}
        assert any(path.suffix == ".safetensors" for path in files)
    assert not list((run.root / "wandb").rglob("*.safetensors"))
