"""Whole runs in parts: two processes share what is trained; another launch, alone, goes on from their state."""

import importlib.util

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


@pytest.mark.parametrize(
    "strategy", ["fsdp2", *(pytest.param(f"zero{stage}", marks=needs_deepspeed) for stage in (2, 3))]
)
def test_two_processes_share_a_model_and_one_goes_on_from_their_state(make_run, uninterrupted, tmp_path, strategy):
    run = make_run(tmp_path / "run")
    in_parts = ("--set", f"parallel.strategy='{strategy}'", "--set", "stage_c.gradient_checkpointing=true")

    codes = run.train_on(2, "--chunk", "real/0000", *in_parts)
    logs = [(tmp_path / f"run.{rank}.log").read_text() for rank in range(2)]

    assert codes == [0, 0], logs
    assert "cannot do" in logs[0]
    previews = [
        sorted(path.name for path in one.root.glob("chunks/real/0000/previews/*")) for one in (run, uninterrupted)
    ]
    assert previews[0] == previews[1] != []
    assert_close(run, uninterrupted, "real/0000", "weights/stage_c.safetensors", atol=1e-3)  # in fp16
    assert_close(run, uninterrupted, "real/0000", "final/model.safetensors", atol=1e-5)
    assert_close(run, uninterrupted, "real/0000", "final/optimizer.safetensors", atol=1e-5)

    assert run.train("--chunk", "real/0001") == 0, run.log.read_text()  # strategy "auto": one process

    for ours, theirs in zip(run.rows("metrics.jsonl"), uninterrupted.rows("metrics.jsonl"), strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-4)
    assert_close(run, uninterrupted, "real/0001", "final/model.safetensors", atol=1e-4)


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


def assert_close(run, expected, chunk: str, name: str, *, atol: float) -> None:
    ours, theirs = (load_file(one.root / "chunks" / chunk / name) for one in (run, expected))

    assert ours.keys() == theirs.keys()
    worst = {key: float((ours[key].float() - theirs[key].float()).abs().max()) for key in ours}
    assert max(worst.values()) < atol, sorted(worst.items(), key=lambda item: -item[1])[:3]
