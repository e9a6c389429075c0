"""The seed's literal command, with other paths and sizes that fit toys, becomes a run.toml that trains."""

import json
import re
import shlex
from pathlib import Path

import torch
from safetensors.torch import load_file

from scripts.tiny_run import Launch
from training.cli import main
from training.stage_c.text_files import load_text_model, save_text_model

SEED = (Path(__file__).parents[1] / "training" / "kohya" / "seed_command.sh").read_text(encoding="utf-8")


def with_values(command: str, **values: object) -> str:
    """Put other values into the seed's command, every other flag as it is."""
    for flag, value in values.items():
        command, number = re.subn(rf"(?m)^--{flag} .*?( \\)?$", rf"--{flag} {shlex.quote(str(value))}\1", command)
        assert number == 1, flag
    return command


def test_the_seeds_command_trains(tmp_path, real_workspace, tiny_models, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    save_text_model(load_text_model(tiny_models / "text_encoder"), tmp_path / "sote_text_model.safetensors")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("scenery, sky --n bad --w 256 --h 256 --d 3 --s 2 --l 4\n")
    command = with_values(
        SEED,
        stage_c_checkpoint_path=tiny_models / "stage_c.safetensors",
        text_model_checkpoint_path=tmp_path / "sote_text_model.safetensors",
        effnet_checkpoint_path=tiny_models / "effnet_encoder.safetensors",
        previewer_checkpoint_path=tiny_models / "previewer.safetensors",
        sample_prompts=prompts,
        output_dir=tmp_path / "run",
        train_data_dir=tmp_path / "pictures",
        in_json=tmp_path / "p.json",
        resume=tmp_path / "sote-state",
        resolution="256,256",
    )
    run_toml = tmp_path / "run.toml"

    code = main(
        ["explain-kohya", command, "--output", str(run_toml), "--workspace", str(real_workspace), "--chunks", "real/*",
         "--set", "device='cpu'", "--set", "save.every_steps=1", "--set", "preview.every_steps=1"]
    )  # fmt: skip
    report = capsys.readouterr().out
    launch = Launch(
        ["run", str(run_toml), "--run-dir", str(tmp_path / "run"), "--chunk", "real/0000"], tmp_path / "log"
    )

    assert code == 0
    assert f"--run-dir {tmp_path / 'run'}" in report
    assert launch.wait(300) == 0, (tmp_path / "log").read_text()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2  # 18 pictures at batch 16
    assert rows[0]["lr/network"] == rows[0]["lr/text_encoder"] == 1e-5 / 100
    weights = tmp_path / "run" / "chunks" / "real" / "0000" / "weights"
    assert {tensor.dtype for tensor in load_file(weights / "stage_c.safetensors").values()} == {torch.float16}
    assert (weights / "text_model.safetensors").is_file()
    assert list((tmp_path / "run" / "chunks" / "real" / "0000" / "previews").rglob("*.png"))
