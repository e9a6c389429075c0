"""What is watched changes nothing of what is trained, and a kill -9 loses nothing of what was seen."""

import json
import os
import re
from functools import partial

import pytest
from PIL import Image

pytestmark = pytest.mark.slow

FIRST, SECOND = "real/0000", "real/0001"
WATCHED = (
    "preview.prompts=[{text='sky, [filewords]', width=256, height=256, steps=2, sampler='ddim'}]",
    "preview.every_steps=5", "validation.chunk='real/held-out'", "validation.every_steps=4", "validation.max_images=4",
    "trackers.tensorboard=true",
)  # fmt: skip


def series(run, name):
    """(step, value) of a chart, over the event files of all launches."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.root / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_a_watched_run_that_is_killed_trains_the_same_and_its_charts_are_whole(
    make_run, uninterrupted, with_held_out, tmp_path
):
    run = make_run(tmp_path / "run", *WATCHED)
    validations = lambda: sum("validation/loss" in row for row in run.rows("metrics.jsonl"))  # noqa: E731

    run.launch("--chunk", FIRST).kill_when(lambda: run.last_step() >= 7)
    run.launch("--chunk", FIRST).kill_when(lambda: validations() >= 3)  # at the chunk's end, before chunk_done
    run.train_all()

    # --- what is trained is what an unwatched run trains ---
    assert run.rows("trace.jsonl") == uninterrupted.rows("trace.jsonl")
    for chunk in (FIRST, SECOND):
        assert run.final_files(chunk) == uninterrupted.final_files(chunk)

    # --- every step and every validation once, in metrics.jsonl and in the charts ---
    steps = [row["global_step"] for row in run.rows("metrics.jsonl") if "train/loss" in row]
    validated = [row["global_step"] for row in run.rows("metrics.jsonl") if "validation/loss" in row]
    assert steps == list(range(1, 21))
    assert validated == [4, 8, 10, 12, 16, 20]
    assert [step for step, _ in series(run, "train/loss")] == steps
    assert [step for step, _ in series(run, "validation/loss")] == validated
    last = run.rows("metrics.jsonl")[-2]
    assert (last["progress/chunk_fraction"], last["progress/campaign_fraction"]) == (1.0, 1.0)
    assert run.rows("metrics.jsonl")[5]["progress/campaign_left_hours"] > 0

    # --- previews keep their caption over launches ---
    pictures = sorted(run.root.glob("chunks/real/*/previews/step-*-00.png"))
    texts = {Image.open(path).text["parameters"].splitlines()[0] for path in pictures}
    assert [int(re.search(r"step-(\d+)", path.name)[1]) for path in pictures] == [5, 10, 15, 20]
    assert len(texts) == 1
    assert next(iter(texts)).startswith("sky, tag ")


def stop_in(global_step: int) -> None:
    """In the training process: a stop is asked for in this step, counted from 1."""
    from training.chunk_run import ChunkRun

    ChunkRun.stop_reason = lambda self: "asked" if self.position.global_step == global_step - 1 else ""


def die_in_previews() -> None:
    """In the training process: kill -9 when previews are to be written."""
    from training import watching

    watching.write_pictures = lambda *arguments: os._exit(9)


def drawn(run):
    return [int(path.name[5:13]) for path in sorted(run.root.glob("chunks/real/*/previews/step-*-strip.png"))]


def validated(run):
    return [row["global_step"] for row in run.rows("metrics.jsonl") if "validation/loss" in row]


@pytest.fixture(scope="module")
def disturbed(make_run, with_held_out, tmp_path_factory):
    """A chunk of ten steps, stopped or killed whenever something is due; with what was there after each launch."""
    due = ("preview.every_steps=4", "validation.every_steps=4", "save.every_steps=4")
    run = make_run(tmp_path_factory.mktemp("disturbed") / "run", *WATCHED, *due)
    moments = []
    for prepare in (partial(stop_in, 4), die_in_previews, partial(stop_in, 8), partial(stop_in, 10), None):
        code = run.train("--chunk", FIRST, prepare=prepare)
        moments.append((code, run.last_exit(), drawn(run), validated(run), steps_fed(run)))
    return run, moments


def steps_fed(run):
    return json.loads((run.root / "trackers.json").read_text())["tensorboard"]["fed"]


def test_what_is_due_in_the_step_of_a_stop_or_a_kill_is_made_by_the_next_launch(disturbed, uninterrupted):
    run, moments = disturbed

    assert moments == [
        (75, 75, [], [], 3),  # stopped in step 4: state, nothing shown; the charts wait with that step
        (9, 75, [], [], 3),  # killed while the previews of step 4 are made, before any step
        (75, 75, [4], [4], 7),  # made; stopped in step 8
        (75, 75, [4, 8], [4, 8], 9),  # stopped in the chunk's last step
        (0, 0, [4, 8, 10], [4, 8, 10], 10),
    ], run.log.read_text()
    assert (run.root / "chunks" / FIRST / "weights" / "stage_c.safetensors").exists()
    assert run.final_files(FIRST) == uninterrupted.final_files(FIRST)


def test_the_charts_hold_all_that_is_promised(disturbed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = disturbed
    events = EventAccumulator(str(run.root / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    promised = [
        "train/loss", "train/weighted_loss", "train/loss_average", "train/grad_norm", "train/images_seen",
        "train/skipped", "train/spike", "data/broken", "data/wait_fraction", "data/wait_seconds", "lr/network",
        "speed/images_per_second", "memory/rss_bytes", "progress/chunk_fraction", "progress/campaign_fraction",
        "progress/campaign_left_hours", "validation/loss", "loss_by_dataset/boards", "loss_by_dataset/photos",
    ]  # fmt: skip

    assert set(promised) <= set(tags["scalars"])
    assert all(
        any(tag.startswith(group) for tag in tags["scalars"]) for group in ("loss_by_timestep/0.", "loss_by_bucket/")
    )
    for tag in ("train/loss", "train/weighted_loss", "train/grad_norm", "lr/network", "progress/campaign_left_hours"):
        assert [event.step for event in events.Scalars(tag)] == list(range(1, 11))
    assert [event.step for event in events.Scalars("validation/loss")] == [4, 8, 10]
    assert {"preview/strip", "preview/00"} <= set(tags["images"])
    assert [event.step for event in events.Images("preview/strip")] == [4, 8, 10]
    assert "learning_rate" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()


def test_two_processes_validate_as_one(make_run, with_held_out, tmp_path):
    options = (
        "data.epochs=1",
        "validation.chunk='real/held-out'",
        "validation.max_images=5",
        "validation.every_steps=2",
    )
    one, two = make_run(tmp_path / "one", *options), make_run(tmp_path / "two", *options)

    codes = [one.train("--chunk", FIRST), *two.train_on(2, "--chunk", FIRST)]

    assert codes == [0, 0, 0], one.log.read_text() + two.root.with_name("two.0.log").read_text()
    found = [[row for row in run.rows("metrics.jsonl") if "validation/loss" in row] for run in (one, two)]
    assert [row["global_step"] for row in found[0]] == [row["global_step"] for row in found[1]] == [2, 4, 5]
    assert [row["validation/loss"] for row in found[1]] == pytest.approx(
        [row["validation/loss"] for row in found[0]], rel=1e-5
    )
