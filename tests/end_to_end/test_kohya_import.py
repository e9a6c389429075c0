"""`training import-state`: a folder as kohya's trainer leaves it becomes the first state of a run, which goes on."""

import pickle
from pathlib import Path

import pytest
import torch

from tests.training.kohya.fake_state import save_kohya_state
from training.cli import main
from training.ledger import EVENTS, Ledger, read_ledger
from training.stage_c.formats import load_stage_c, save_stage_c
from training.stage_c.layouts import to_original
from training.stage_c.text_files import load_text_model, save_text_model
from training.state_folder import load_state

ADAFACTOR = (
    "optimizer.name=adafactor", "optimizer.max_grad_norm=0.0", "stage_c.train_text_encoder=true", "data.epochs=1",
    "preview.prompts=[]",
)  # fmt: skip


def kohya_folder(tmp_path: Path, models: Path, **options: object) -> Path:
    """Another network's weights than the run's settings name, in a folder of kohya's."""
    network = load_stage_c(models / "stage_c.safetensors")
    text_model = load_text_model(models / "text_encoder")
    with torch.no_grad():
        for parameter in [*network.parameters(), *text_model.parameters()]:
            parameter.mul_(0.5).add_(0.01)
    save_kohya_state(tmp_path / "last-state", network, text_model, **options)  # type: ignore[arg-type]
    return tmp_path / "last-state"


def imported_tensors(run) -> dict[str, torch.Tensor]:
    folder = next((run.root / "imported").iterdir())
    return load_state(folder).component("model")


def test_a_run_goes_on_from_kohyas_weights_and_moments(tmp_path, make_run, tiny_models, capsys):
    source = kohya_folder(tmp_path, tiny_models)
    run = make_run(tmp_path / "run", *ADAFACTOR, "schedule.warmup_steps=10")

    code = main(["import-state", str(source), *run.arguments("", "--step", "500")[1:]])
    report = capsys.readouterr().out

    assert code == 0
    assert "network, " in report and "text encoder, " in report
    assert "optimizer adafactor" in report and "3 updates" in report
    assert "random_states_0.pkl: not read" in report
    assert "scheduler.bin: rates are a function of the global step, here 500; kohya counted 3" in report
    assert run.events("imported")[0]["global_step"] == 500
    assert main(run.arguments("status")) == 0
    assert "global step 500  updates 0" in capsys.readouterr().out
    assert set(run.events("imported")[0]["files"]) == {"model.safetensors", "model_1.safetensors", "optimizer.bin"}

    assert run.train("--chunk", "real/0000") == 0

    assert run.events("started")[0]["resumed_from"] == "imported/state-00000500"
    rows = run.rows("metrics.jsonl")
    assert rows[0]["global_step"] == 501
    assert rows[0]["lr/network"] == pytest.approx(1e-3)  # the warm-up is long over
    assert main(run.arguments("status", "--verify")) == 0
    assert run.train("--chunk", "real/0001") == 0
    assert run.events("started")[1]["parent"] == "real/0000"


def test_weights_are_kohyas_bit_for_bit(tmp_path, make_run, tiny_models, capsys):
    network, text_model = (
        load_stage_c(tiny_models / "stage_c.safetensors"),
        load_text_model(tiny_models / "text_encoder"),
    )
    saved = save_kohya_state(tmp_path / "s-state", network, text_model, half=True)
    run = make_run(tmp_path / "run", *ADAFACTOR, "ema.enabled=true")

    code = main(["import-state", str(tmp_path / "s-state"), *run.arguments("")[1:]])

    tensors = imported_tensors(run)
    expected = to_original(saved)
    assert code == 0
    assert {name.removeprefix("network.") for name in tensors if name.startswith("network.")} == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(tensors[f"network.{name}"], tensor.float())
    text = text_model.state_dict()
    for name, tensor in tensors.items():
        if name.startswith("text.text_model."):
            assert torch.equal(tensor, text[name.removeprefix("text.text_model.")].float())
    average = load_state(next((run.root / "imported").iterdir())).component("ema")
    assert all(torch.equal(average[name], tensors[name]) for name in average)


def test_a_launch_killed_before_its_first_state_starts_from_the_imported_one_again(tmp_path, make_run, tiny_models):
    source = kohya_folder(tmp_path, tiny_models)
    run = make_run(tmp_path / "run", *ADAFACTOR, "save.every_steps=1000")
    twin = make_run(tmp_path / "twin", *ADAFACTOR, "save.every_steps=1000")
    for one in (run, twin):
        assert main(["import-state", str(source), *one.arguments("")[1:]]) == 0

    run.launch("--chunk", "real/0000").kill_when(lambda: run.last_step() >= 2)
    assert run.train("--chunk", "real/0000") == 0
    assert twin.train("--chunk", "real/0000") == 0

    assert [one["resumed_from"] for one in run.events("started")] == ["imported/state-00000000"] * 2
    assert run.final_files("real/0000") == twin.final_files("real/0000")


def test_an_export_with_its_text_model_beside_it_is_enough(tmp_path, make_run, tiny_models, capsys):
    network, text_model = (
        load_stage_c(tiny_models / "stage_c.safetensors"),
        load_text_model(tiny_models / "text_encoder"),
    )
    save_stage_c(network, tmp_path / "sote.safetensors", dtype=torch.float16)
    save_text_model(text_model, tmp_path / "sote_text_model.safetensors", dtype=torch.float16)
    run = make_run(tmp_path / "run", *ADAFACTOR)

    code = main(["import-state", str(tmp_path / "sote.safetensors"), *run.arguments("")[1:], "--dry-run"])
    report = capsys.readouterr().out

    assert code == 0
    assert "from sote.safetensors" in report and "from sote_text_model.safetensors" in report
    assert "optimizer: not there" in report
    assert not run.root.exists()


def test_what_cannot_be_carried_is_said(tmp_path, make_run, tiny_models, capsys):
    source = kohya_folder(tmp_path, tiny_models, optimizer_name="adamw")
    (source / "scaler.pt").write_bytes(b"")
    torch.save({"scale": 2.0**14, "growth_factor": 2.0, "_growth_tracker": 7}, source / "scaler.pt")
    run = make_run(tmp_path / "run", "optimizer.name=adafactor", "optimizer.max_grad_norm=0.0",
                   "stage_c.loss_weighting=adaptive")  # fmt: skip

    code = main(["import-state", str(source), *run.arguments("")[1:]])
    report = capsys.readouterr().out

    assert code == 0
    assert "not taken over: text encoder in model_1.safetensors: the run does not train it" in report
    assert "not taken over: optimizer: the run's optimizer is 'adafactor', but it is adamw's" in report
    assert "adaptive loss table" in report
    assert "a loss scale is for" in report


def test_the_loss_scale_of_fp16_goes_on(tmp_path, make_run, tiny_models):
    source = kohya_folder(tmp_path, tiny_models, half=True)
    torch.save({"scale": 2.0**14, "growth_factor": 2.0, "_growth_tracker": 7}, source / "scaler.pt")
    fp16 = ("precision.autocast=fp16", "precision.weights=fp16")
    run = make_run(tmp_path / "run", *ADAFACTOR, *fp16)

    assert main(["import-state", str(source), *run.arguments("")[1:]]) == 0

    facts = load_state(next((run.root / "imported").iterdir())).facts
    assert facts["loss_scale"] == {"scale": 2.0**14, "good_steps": 7}


class Code:
    """What unpickles to a call."""

    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize("kind", ["code", "damaged", "nothing", "other", "begun"])
def test_what_cannot_be_imported_is_refused(tmp_path, make_run, tiny_models, capsys, kind):
    run = make_run(tmp_path / "run", *ADAFACTOR)
    source = tmp_path / "x-state"
    if kind != "nothing":
        source = kohya_folder(tmp_path, tiny_models)
    if kind == "code":
        (source / "optimizer.bin").write_bytes(pickle.dumps(Code()))
    elif kind == "damaged":
        (source / "model.safetensors").write_bytes(b"12345678")
    elif kind == "other":
        (source / "model.safetensors").unlink()
        (source / "model_1.safetensors").unlink()
        (source / "lora.safetensors").write_bytes(b"")
    elif kind == "begun":
        begun = dict.fromkeys(EVENTS["started"], "real/0000")
        Ledger.open(run.root / "ledger.jsonl", guard=lambda: None).append("started", **begun)
    before = read_ledger(run.root / "ledger.jsonl")

    code = main(["import-state", str(source), *run.arguments("")[1:]])
    told = capsys.readouterr()

    expected = {"code": 3, "damaged": 3, "nothing": 2, "other": 3, "begun": 2}
    assert code == expected[kind]
    assert len([line for line in told.err.splitlines() if line.startswith("error: ")]) == 1
    assert "run" not in told.out.split()
    assert read_ledger(run.root / "ledger.jsonl") == before
    assert not (run.root / "imported").exists()
