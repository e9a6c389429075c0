"""A loss far above those before it: the run goes back once per chunk, on all ranks, and also when it is killed."""

import os
from functools import partial

import pytest

pytestmark = pytest.mark.slow

FIRST = "real/0000"
STEPS_PER_EPOCH = 5
GOES_BACK = ("data.epochs=6", "trackers.on_spike='rollback'", "preview.prompts=[]", "save.export_every_chunks=0")


def spike_at(*global_steps: int) -> None:
    """In the training process: the losses of these steps, counted from 1, are a thousand times what they are."""
    from training.recipes.stage_c import StageC

    loss = StageC.loss

    def spiked(self, model, batch, **options):
        found = loss(self, model, batch, **options)
        step = batch.identities[0].epoch * STEPS_PER_EPOCH + batch.step + 1
        factor = 1000 if step in global_steps else 1
        return type(found)(found.per_sample * factor, found.weights, found.scalars)

    StageC.loss = spiked


def spike_and_die(moment: str, *global_steps: int) -> None:
    """The same, and kill -9 before the ledger's line about going back, behind it, or in the first step after it."""
    from training import chunk_run
    from training.records import Records

    spike_at(*global_steps)
    if moment == "before the line":
        Records.rolled_back = lambda *arguments, **options: os._exit(9)
    elif moment == "behind the line":
        chunk_run.remove_states = lambda folders: os._exit(9)
    else:
        step_done = Records.step_done

        def die(self, report, spike=None):
            if any(line.event == "rolled_back" for line in self.ledger.lines):
                os._exit(9)
            step_done(self, report, spike)

        Records.step_done = die


@pytest.fixture(scope="module")
def went_back(make_run, tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("went_back") / "run", *GOES_BACK)
    assert run.train("--chunk", FIRST, prepare=partial(spike_at, 25, 28)) == 0, run.log.read_text()
    return run


def passed_over(run):
    return [line["global_step"] for line in run.events("skipped") if line["reason"] == "passed_over"]


def test_a_run_goes_back_behind_a_spike_once_and_passes_over_its_step(went_back):
    (back,) = went_back.events("rolled_back")
    (done,) = went_back.events("chunk_done")

    assert (back["reason"], back["from_global_step"], back["global_step"]) == ("loss_spike", 25, 22)
    assert back["pass_over"] == passed_over(went_back) == [24, 25]
    rows = went_back.rows("metrics.jsonl")
    assert [row["global_step"] for row in rows] == list(range(1, 31))
    assert [row["global_step"] for row in rows if row.get("train/spike")] == [28]  # the second one is only told
    assert went_back.log.read_text().count("loss spike: weighted loss") == 3  # met, why the run goes back, met again
    assert done["applied_updates"] == 28


@pytest.mark.parametrize("moment", ["before the line", "behind the line", "in the first step after it"])
def test_a_kill_while_going_back_changes_nothing(make_run, went_back, tmp_path, moment):
    run = make_run(tmp_path / "run", *GOES_BACK)

    killed = run.train("--chunk", FIRST, prepare=partial(spike_and_die, moment, 25, 28))
    again = run.train("--chunk", FIRST, prepare=partial(spike_at, 25, 28))

    assert (killed, again) == (9, 0), run.log.read_text()
    assert len(run.events("rolled_back")) == 1
    assert run.rows("trace.jsonl") == went_back.rows("trace.jsonl")
    assert run.final_files(FIRST) == went_back.final_files(FIRST)
    assert passed_over(run)[-2:] == [24, 25]


def test_two_processes_go_back_as_one_does(make_run, went_back, tmp_path):
    run = make_run(tmp_path / "run", *GOES_BACK)

    codes = [launch.wait() for launch in run.launch_on(2, "--chunk", FIRST, prepare=partial(spike_at, 25, 28))]

    assert codes == [0, 0], run.root.with_name("run.0.log").read_text()
    assert run.events("rolled_back") == went_back.events("rolled_back")
    assert passed_over(run) == [24, 25]


def test_without_the_setting_a_spike_is_only_told(make_run, tmp_path):
    run = make_run(tmp_path / "run", *GOES_BACK, "trackers.on_spike='warn'")

    assert run.train("--chunk", FIRST, prepare=partial(spike_at, 25)) == 0, run.log.read_text()

    assert run.events("rolled_back") == run.events("skipped") == []
    assert [row["global_step"] for row in run.rows("metrics.jsonl") if row.get("train/spike")] == [25]
