"""Settings that change how training runs, each on the real recipe at toy size, and what must hold with them."""

import math

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

FIRST, ONE_EPOCH = "real/0000", "data.epochs=1"
EVERYTHING_TRAINED = (
    ONE_EPOCH, "stage_c.train_text_encoder=true", "optimizer.text_encoder_learning_rate=1e-4",
    "optimizer.name='adafactor'", "stage_c.gradient_checkpointing=true", "stage_c.loss_weighting='adaptive'",
    "save.every_steps=1", "save.export_dtype='fp32'",
)  # fmt: skip


def losses(run):
    return [sample[3] for row in run.rows("trace.jsonl") for sample in row["samples"]]


@pytest.fixture(scope="module")
def one_epoch(make_run, tmp_path_factory):
    """One epoch of one chunk, in fp32, one process."""
    run = make_run(tmp_path_factory.mktemp("one") / "run", ONE_EPOCH)
    assert run.train("--chunk", FIRST) == 0, run.log.read_text()
    return run


@pytest.fixture(scope="module")
def everything_trained(make_run, tmp_path_factory):
    """Text encoder and network, with Adafactor, checkpointing and adaptive weights."""
    run = make_run(tmp_path_factory.mktemp("text") / "run", *EVERYTHING_TRAINED)
    assert run.train("--chunk", FIRST) == 0, run.log.read_text()
    return run


def test_a_trained_text_encoder_is_exported_with_its_changes(everything_trained, tiny_models):
    exported = everything_trained.root / "chunks" / FIRST / "weights" / "text_model.safetensors"
    after, before = load_file(exported), load_file(tiny_models / "text_encoder" / "model.safetensors")

    changed = [name for name, tensor in before.items() if name in after and not tensor.equal(after[name])]
    rates = everything_trained.rows("trace.jsonl")[-1]["rates"]
    assert any("layers.0" in name for name in changed) and "text_projection.weight" in changed
    assert rates == {"network": 1e-3, "text_encoder": 1e-4}


def test_adafactor_text_encoder_and_loss_table_survive_a_kill(make_run, everything_trained, tmp_path):
    run = make_run(tmp_path / "run", *EVERYTHING_TRAINED)

    run.launch("--chunk", FIRST).kill_when(lambda: run.last_step() >= 3)
    code = run.train("--chunk", FIRST)

    assert code == 0, run.log.read_text()
    assert len([line for line in run.events("started") if line["global_step"] > 0]) == 1
    assert run.rows("trace.jsonl") == everything_trained.rows("trace.jsonl")
    assert run.final_files(FIRST) == everything_trained.final_files(FIRST)
    assert "recipe.safetensors" in run.final_files(FIRST)


def test_checkpointing_changes_no_loss(make_run, one_epoch, tmp_path):
    run = make_run(tmp_path / "run", ONE_EPOCH, "stage_c.gradient_checkpointing=true")

    assert run.train("--chunk", FIRST) == 0, run.log.read_text()

    assert losses(run) == pytest.approx(losses(one_epoch), rel=1e-6)


def test_a_compiled_forward_changes_no_loss(make_run, one_epoch, tmp_path):
    run = make_run(tmp_path / "run", ONE_EPOCH, "compile='aot_eager'", "stage_c.dropout=0.0")
    plain = make_run(tmp_path / "plain", ONE_EPOCH, "stage_c.dropout=0.0")

    assert run.train("--chunk", FIRST) == 0, run.log.read_text()
    assert plain.train("--chunk", FIRST) == 0, plain.log.read_text()

    assert losses(run) == pytest.approx(losses(plain), rel=1e-5)


def test_autocast_stays_near_fp32_and_keeps_master_weights_in_it(make_run, one_epoch, tmp_path):
    run = make_run(tmp_path / "run", ONE_EPOCH, "precision.autocast='bf16'")

    assert run.train("--chunk", FIRST) == 0, run.log.read_text()

    state = load_file(run.root / "chunks" / FIRST / "final" / "model.safetensors")
    assert losses(run) == pytest.approx(losses(one_epoch), rel=0.05)
    assert losses(run) != losses(one_epoch)
    assert {str(tensor.dtype) for tensor in state.values()} == {"torch.float32"}


def test_ddp_and_adaptive_weights_on_two_processes_equal_one(make_run, tmp_path):
    options = (
        ONE_EPOCH,
        "precision.exact=false",
        "stage_c.loss_weighting='adaptive'",
        "stage_c.train_text_encoder=true",
    )
    one, two = make_run(tmp_path / "one", *options), make_run(tmp_path / "two", *options)

    codes = [one.train("--chunk", FIRST), *two.train_on(2, "--chunk", FIRST)]

    assert codes == [0, 0, 0], one.log.read_text() + two.root.with_name("two.0.log").read_text()
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    tables = [load_file(run.root / "chunks" / FIRST / "final" / "recipe.safetensors")["losses"] for run in (one, two)]
    assert tables[1].tolist() == pytest.approx(tables[0].tolist(), rel=1e-6)
    assert [row["rates"] for row in two.rows("trace.jsonl")] == [row["rates"] for row in one.rows("trace.jsonl")]


def test_the_world_size_may_change_within_a_chunk(make_run, one_epoch, tmp_path):
    run = make_run(tmp_path / "run", ONE_EPOCH, "save.every_steps=1")

    run.launch("--chunk", FIRST).kill_when(lambda: run.last_step() >= 2)
    codes = run.train_on(3, "--chunk", FIRST)

    assert codes == [0, 0, 0], run.root.with_name("run.0.log").read_text()
    assert [row["planned"] for row in run.rows("trace.jsonl")] == [
        row["planned"] for row in one_epoch.rows("trace.jsonl")
    ]
    assert losses(run) == pytest.approx(losses(one_epoch), rel=1e-5)


def test_tokens_that_do_not_fit_are_counted(make_run, tmp_path):
    run = make_run(tmp_path / "run", ONE_EPOCH, "stage_c.max_tokens=75", f"caption.prefix='{'very long ' * 40}'")

    assert run.train("--chunk", FIRST) == 0, run.log.read_text()

    assert all(row["sample_mean/cut_tokens"] > 5 for row in run.rows("metrics.jsonl"))


def test_the_charts_of_a_run_hold_what_the_loop_measured(one_epoch):
    rows = one_epoch.rows("metrics.jsonl")

    assert all(math.isfinite(row["train/loss"]) and row["train/grad_norm"] > 0 for row in rows)
    assert rows[-1]["train/images_seen"] == 18
    assert all(row["sample_mean/cut_tokens"] == 0 and 0 < row["sample_mean/timestep"] <= 1 for row in rows)
    assert {"loss_by_dataset/boards", "loss_by_dataset/photos"} <= {name for row in rows for name in row}
