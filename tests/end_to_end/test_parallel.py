"""Whole runs on several processes: in parts, killed, and with another number of processes than before."""

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from scripts.bench.elastic import compare
from scripts.bench.kill_in_parts import measure_strategy, missing_for

pytestmark = pytest.mark.slow

ZERO = [
    pytest.param(
        f"zero{stage}",
        marks=pytest.mark.skipif(bool(missing_for("zero2")), reason=missing_for("zero2") or "not needed"),
    )
    for stage in (2, 3)
]
FIRST, SECOND = "real/0000", "real/0001"
WATCHED = (
    "validation.chunk='real/held-out'", "validation.max_images=5", "validation.every_steps=4", "preview.every_steps=5",
    "preview.prompts=[{text='sky', width=256, height=256, steps=2, sampler='ddim'}]",
)  # fmt: skip


@pytest.fixture(scope="module")
def watched(make_run, with_held_out, tmp_path_factory):
    """A run with previews and validation on one process, and the settings that it has beyond the others'."""
    run = make_run(tmp_path_factory.mktemp("watched") / "run", *WATCHED)
    run.train_all()
    return run


@pytest.mark.parametrize("strategy", ["fsdp2", *ZERO])
def test_two_processes_share_a_model_and_one_goes_on_from_their_state(make_run, watched, tmp_path, strategy):
    run = make_run(tmp_path / "run", *WATCHED)
    in_parts = ("--set", f"parallel.strategy='{strategy}'", "--set", "stage_c.gradient_checkpointing=true")

    codes = run.train_on(2, "--chunk", FIRST, *in_parts)
    logs = [(tmp_path / f"run.{rank}.log").read_text() for rank in range(2)]

    assert codes == [0, 0], logs
    assert "cannot do" in logs[0]
    assert_same_pictures(run, watched, FIRST)
    assert_close(run, watched, FIRST, "weights/stage_c.safetensors", atol=1e-3)  # in fp16
    assert_close(run, watched, FIRST, "final/model.safetensors", atol=1e-5)
    assert_close(run, watched, FIRST, "final/optimizer.safetensors", atol=1e-5)

    assert run.train("--chunk", SECOND) == 0, run.log.read_text()  # strategy "auto": one process

    assert losses(run, "train/loss") == pytest.approx(losses(watched, "train/loss"), rel=1e-4)
    ours, theirs = (losses(one, "validation/loss") for one in (run, watched))
    assert len(ours) == 6
    assert ours[:3] == pytest.approx(theirs[:3], rel=1e-5)
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert_close(run, watched, SECOND, "final/model.safetensors", atol=1e-4)


def test_the_number_of_processes_changes_twice_within_a_chunk(tmp_path):
    found = compare(tmp_path, sizes=(1, 3, 2), num_steps=3)

    assert found.is_same_list
    assert max(found.differences) <= 1e-5
    assert found.table_difference <= 1e-5
    assert min(found.steps) >= 3


@pytest.mark.parametrize("strategy", ["fsdp2", ZERO[0]])
def test_runs_in_parts_that_are_killed_at_random_end_as_if_nobody_had_disturbed_them(tmp_path, strategy):
    account = measure_strategy(tmp_path, strategy, num_kills=3, seed=5)

    assert account.kills.total() >= 3
    assert account.problems == []


def test_fsdp_computes_in_bf16_with_a_text_encoder_and_activations_computed_twice(make_run, tmp_path):
    settings = [
        "precision.autocast='bf16'", "stage_c.train_text_encoder=true", "stage_c.gradient_checkpointing=true",
        "optimizer.name='adafactor'", "data.epochs=1", "preview.prompts=[]",
    ]  # fmt: skip
    alone = make_run(tmp_path / "alone", *settings)
    shared = make_run(tmp_path / "shared", *settings, "parallel.strategy='fsdp2'")

    assert alone.train("--chunk", "real/0000") == 0, alone.log.read_text()
    assert shared.train_on(2, "--chunk", "real/0000") == [0, 0], (tmp_path / "shared.0.log").read_text()

    rows = zip(shared.rows("metrics.jsonl"), alone.rows("metrics.jsonl"), strict=True)
    assert all(ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=2e-3) for ours, theirs in rows)
    for name in ("stage_c", "text_model"):
        ours, theirs = (load_file(one.root / f"chunks/real/0000/weights/{name}.safetensors") for one in (shared, alone))
        assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


def losses(run, name: str) -> list[float]:
    return [row[name] for row in run.rows("metrics.jsonl") if name in row]


def assert_same_pictures(run, expected, chunk: str) -> None:
    """Previews of the same steps, and of the same pixels but for rounding."""
    ours, theirs = (sorted(one.root.glob(f"chunks/{chunk}/previews/step-*.png")) for one in (run, expected))

    assert [path.name for path in ours] == [path.name for path in theirs] != []
    for one, other in zip(ours, theirs, strict=True):
        difference = np.abs(np.asarray(Image.open(one), np.int16) - np.asarray(Image.open(other), np.int16))
        assert difference.max() <= 2, f"{one.name}: {difference.max()} of 255"


def assert_close(run, expected, chunk: str, name: str, *, atol: float) -> None:
    ours, theirs = (load_file(one.root / "chunks" / chunk / name) for one in (run, expected))

    assert ours.keys() == theirs.keys()
    worst = {key: float((ours[key].float() - theirs[key].float()).abs().max()) for key in ours}
    assert max(worst.values()) < atol, sorted(worst.items(), key=lambda item: -item[1])[:3]
