"""Optimizers and number formats on the real recipe: what a kill must not change, and what is exported."""

import pytest
from safetensors.torch import load_file

from scripts.tiny_run import Launch

pytestmark = pytest.mark.slow

FIRST, ONE_EPOCH = "real/0000", ("data.epochs=1", "preview.prompts=[]", "save.export_dtype='fp32'")
BF16 = ("precision.autocast='bf16'", "precision.weights='bf16'")
SETTINGS = {
    "lion_and_a_running_average": ("optimizer.name='lion'", "optimizer.learning_rate=1e-4", "ema.enabled=true",
                                   "ema.decay=0.5"),
    "updates_inside_backward": (*BF16, "optimizer.name='adafactor'", "optimizer.fused_backward=true",
                                "optimizer.max_grad_norm=0", "batch.batch_size=1"),
    "fp16_forward": ("precision.autocast='fp16'",),
    "schedule_free": ("optimizer.name='schedule_free'",),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_a_kill_changes_no_bit_and_the_exported_weights_are_those_shown(make_run, tmp_path, name):
    if name == "schedule_free":
        pytest.importorskip("schedulefree")
    whole = make_run(tmp_path / "whole", *ONE_EPOCH, *SETTINGS[name])
    assert whole.train("--chunk", FIRST) == 0, whole.log.read_text()

    run = make_run(tmp_path / "run", *ONE_EPOCH, *SETTINGS[name])
    run.launch("--chunk", FIRST).kill_when(lambda: run.last_step() >= 3)
    assert run.train("--chunk", FIRST) == 0, run.log.read_text()

    assert run.rows("trace.jsonl") == whole.rows("trace.jsonl")
    assert run.final_files(FIRST) == whole.final_files(FIRST)
    exported = load_file(run.root / "chunks" / FIRST / "weights" / "stage_c.safetensors")
    assert Launch(run.arguments("export", "--output", str(tmp_path / "again")), run.log).wait() == 0, (
        run.log.read_text()
    )
    again = load_file(tmp_path / "again" / "stage_c.safetensors")
    assert exported.keys() == again.keys() and all(exported[key].equal(again[key]) for key in exported)
    model = load_file(run.root / "chunks" / FIRST / "final" / "model.safetensors")
    is_trained = [exported[key].equal(model[f"network.{key}"].float()) for key in exported if f"network.{key}" in model]
    assert len(is_trained) > 20
    assert all(is_trained) == (name in ("updates_inside_backward", "fp16_forward"))
