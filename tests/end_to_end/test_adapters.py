"""Whole runs of adapters and tokens: killed, on two processes, in parts; their states hold no base."""

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

LORA = (
    "optimizer.learning_rate=0.01",
    "lora={base_weights = 'fp32', targets = ['kohya'], text_encoder = {}, formats = ['kohya', 'merged']}",
    "tokens={train = [{token = '[it]', initialise = '^scenery</w>'}, {existing = '^sky</w>'}]}",
    "ema.enabled=true",
    "stage_c.gradient_checkpointing=true",
    "preview.prompts=[{text = 'a [it]', width = 256, height = 256, steps = 2}]",
)


def finals(run) -> dict[str, bytes]:
    return {name: data for chunk in ("real/0000", "real/0001") for name, data in run.final_files(chunk).items()}


@pytest.fixture(scope="module")
def undisturbed(make_run, tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("adapters") / "run", *LORA)
    run.train_all()
    return run


def test_a_killed_run_of_adapters_goes_on_to_the_same_bits(make_run, undisturbed, tmp_path):
    run = make_run(tmp_path / "run", *LORA)

    run.launch("--chunk", "real/0000").kill_when(lambda: run.last_step() >= 5)
    run.train_all()

    assert finals(run) == finals(undisturbed)
    names = ("lora.safetensors", "stage_c.safetensors", "tokens/it.safetensors")
    for name in names:
        ours, theirs = (one.root / "chunks/real/0001/weights" / name for one in (run, undisturbed))
        assert load_file(ours).keys() == load_file(theirs).keys()
        assert all((load_file(ours)[key] == value).all() for key, value in load_file(theirs).items())


def test_a_state_holds_what_is_trained_and_nothing_else(undisturbed, tiny_models):
    state = load_file(undisturbed.root / "chunks/real/0001/final/model.safetensors")
    base = (tiny_models / "stage_c.safetensors").stat().st_size

    assert all("lora_" in name or name.endswith((".change", ".initial")) for name in state)
    assert sum(value.nbytes for value in state.values()) < base / 5


def test_another_base_is_refused(make_run, undisturbed, tmp_path):
    import shutil

    from scripts.demo_models.stage_c import make_stage_c_models

    shutil.copytree(undisturbed.root, tmp_path / "run")
    make_stage_c_models(tmp_path, seed=8)
    run = make_run(tmp_path / "run", *LORA, f"stage_c.network='{tmp_path}/stage_c.safetensors'", "data.epochs=3")

    assert run.train("--chunk", "real/0000") != 0
    assert "stage_c.network" in run.errors()[-1]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_the_same_adapters(make_run, undisturbed, tmp_path, strategy):
    in_run = LORA if strategy == "ddp" else [one.replace(", 'merged'", "") for one in LORA]
    run = make_run(tmp_path / "run", *in_run, f"parallel.strategy='{strategy}'")

    codes = run.train_on(2, "--chunk", "real/0000")

    assert codes == [0, 0], (tmp_path / "run.0.log").read_text()
    ours, theirs = (load_file(one.root / "chunks/real/0000/final/model.safetensors") for one in (run, undisturbed))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) < 1e-4
