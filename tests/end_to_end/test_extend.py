"""A finished run is extended: trained again in new epochs, or on new chunks, each image as often as planned."""

from collections import Counter

import pytest

from training.cli import main

pytestmark = pytest.mark.slow

FIRST, SECOND = "real/0000", "real/0001"


def trained(run):
    return Counter(
        (row["chunk"], row["epoch"], sample[0]) for row in run.rows("trace.jsonl") for sample in row["samples"]
    )


def grow(run, setting):
    """Change an override of the run; later launches use it."""
    key = setting.partition("=")[0]
    run.overrides = [*(one for one in run.overrides if not one.startswith(f"{key}=")), setting]


def test_more_epochs_of_one_chunk_equal_a_run_that_had_them_from_the_start(make_run, tmp_path):
    whole = make_run(tmp_path / "whole", f"data.chunks=['{FIRST}']", "trackers.trace=true")
    grown = make_run(tmp_path / "grown", f"data.chunks=['{FIRST}']", "trackers.trace=true")
    assert whole.train() == 0

    grow(grown, "data.epochs=1")
    assert grown.train() == 0
    grow(grown, "data.epochs=2")
    assert grown.train() == 0

    assert grown.rows("trace.jsonl") == whole.rows("trace.jsonl")
    assert grown.final_files(FIRST) == whole.final_files(FIRST)
    (line,) = grown.events("extended")
    assert (line["epochs"], line["chunks"]) == (2, [])
    assert "data.epochs 1 -> 2; learning rate:" in line["reason"]
    assert "epochs = 2" in (grown.root / "run.toml").read_text()


def test_chunks_are_trained_again_in_order_also_when_that_is_killed(make_run, tmp_path):
    runs = [make_run(tmp_path / name, "data.epochs=1", "trackers.trace=true") for name in ("calm", "killed")]
    for run in runs:
        assert run.train("--chunks", ":") == 0
        grow(run, "data.epochs=3")
    calm, killed = runs
    done = calm.last_step()

    calm.train_all()
    killed.launch().kill_when(lambda: killed.last_step() >= done + 3)
    assert main(["status", "--verify", "--run-dir", str(killed.root)]) == 0
    assert killed.train("--chunk", SECOND) == 3  # the first one is half trained
    assert f"chunk {SECOND}: {FIRST} is half trained" in killed.errors()[-1]
    assert killed.train("--chunks", ":") == 0

    assert main(["status", "--verify", "--run-dir", str(killed.root)]) == 0
    assert killed.rows("trace.jsonl") == calm.rows("trace.jsonl")
    assert killed.final_files(SECOND) == calm.final_files(SECOND)
    assert set(trained(calm).values()) == {1}
    assert sorted({(chunk, epoch) for chunk, epoch, _ in trained(calm)}) == [
        (chunk, epoch) for chunk in (FIRST, SECOND) for epoch in range(3)
    ]
    order = list(dict.fromkeys((row["chunk"], row["epoch"]) for row in calm.rows("trace.jsonl")))
    assert order == [(FIRST, 0), (SECOND, 0), (FIRST, 1), (FIRST, 2), (SECOND, 1), (SECOND, 2)]
    assert [row["global_step"] for row in calm.rows("trace.jsonl")] == list(range(1, calm.last_step() + 1))
    assert calm.train() == 0  # and nothing is left to do
    assert calm.rows("trace.jsonl") == killed.rows("trace.jsonl")


def test_a_chunk_may_be_appended(make_run, tmp_path):
    run = make_run(tmp_path / "run", f"data.chunks=['{FIRST}']")
    assert run.train() == 0

    grow(run, f"data.chunks=['{FIRST}', '{SECOND}']")
    assert run.train() == 0

    (line,) = run.events("extended")
    assert line["chunks"] == [SECOND]
    assert [fields["chunk"] for fields in run.events("chunk_done")] == [FIRST, SECOND]


def test_a_rate_that_has_fallen_to_nothing_is_refused(make_run, tmp_path):
    falling = ("schedule.name='linear'", "schedule.total_steps=4", "schedule.warmup_steps=1", "data.epochs=1")
    run = make_run(tmp_path / "run", f"data.chunks=['{FIRST}']", *falling)
    assert run.train() == 0
    grow(run, "data.epochs=2")

    assert run.train() == 2
    assert "where the learning rate has fallen to 0" in run.errors()[-1]

    grow(run, "schedule.total_steps=100")
    assert run.train() == 0
    assert "horizon 4 -> 100 steps" in run.events("extended")[0]["reason"]
