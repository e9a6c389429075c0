"""What is watched changes nothing of what is trained, and a kill -9 loses nothing of what was seen."""

import re

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
