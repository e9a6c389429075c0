"""`training export` and `preview` on the command line: conversions without a run, and what is refused."""

import json

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from scripts.demo_models.stage_c import make_stage_c_models
from training.cli import main
from training.stage_c.formats import load_stage_c
from training.stage_c.layouts import from_original


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_stage_c_models(tmp_path_factory.mktemp("models"), seed=3)


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def test_weights_are_converted_there_and_back_without_a_changed_bit(models, tmp_path, capsys):
    folder, encoder = tmp_path / "there", ("--text-encoder", models["text_encoder"])
    back = tmp_path / "back"

    assert run("export", "--from", models["stage_c"], *encoder, "--format", "diffusers", "--output",
               folder) == 0  # fmt: skip
    assert run("export", "--from", folder / "diffusers", "--output", back) == 0

    before, after = load_file(models["stage_c"]), load_file(back / "stage_c.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    text = load_file(models["text_encoder"] / "model.safetensors")
    assert all(torch.equal(text[key], value) for key, value in load_file(back / "text_model.safetensors").items())
    assert f"{back / 'stage_c.safetensors'}  (0 values overflowed, 0 vanished)" in capsys.readouterr().out


def test_a_kohya_state_becomes_an_export_with_the_header_it_came_with(models, tmp_path):
    network = load_stage_c(models["stage_c"])
    kohya = {key: value.clone() for key, value in from_original(network.state_dict(), "kohya").items()}
    with safe_open(models["stage_c"], framework="pt") as file:
        own = file.metadata()
    own |= {"ss_steps": "12", "chunkline.global_step": "7", "secret": "x", "modelspec.title": "before"}
    save_file(kohya, tmp_path / "model.safetensors", metadata=own)

    code = run("export", "--from", tmp_path, "--output", tmp_path / "out", "--dtype", "fp32")

    assert code == 0
    with safe_open(tmp_path / "out" / "stage_c.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["modelspec.title"], metadata["ss_steps"], "secret" in metadata) == ("before", "12", False)
    assert "down_blocks.0.2.attention.attn.in_proj_weight" in load_file(tmp_path / "out" / "stage_c.safetensors")
    config = json.loads((tmp_path / "out" / "stage_c_config" / "config.json").read_text())
    assert config["block_out_channels"] == [64, 64]


def test_pictures_are_made_from_weights_and_a_prompt_file(models, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("sky --w 256 --h 320 --d 3 --s 2\nsea --w 256 --h 256 --d 4 --s 2 --l 2\n")
    weights = ("--from", models["stage_c"], "--text-encoder", models["text_encoder"])

    code = run("preview", *weights, "--prompts", prompts, "--previewer", models["previewer"], "--output", tmp_path)

    assert code == 0
    with Image.open(tmp_path / "step-00000000-00.png") as picture:
        assert picture.size == (48, 64)
        assert "Steps: 2, Sampler: ddpm, CFG scale: 8.0, Seed: 3" in picture.info["parameters"]
    with Image.open(tmp_path / "step-00000000-01.png") as picture:
        assert "CFG scale: 2.0, Seed: 4" in picture.info["parameters"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("export",), "what to export? Give --run-dir, or weights with --from"),
        (("preview",), "what to draw? Give --run-dir, or weights with --from"),
        (("export", "--from", "x", "--decoder-from", "y"), "--decoder-from goes with --format diffusers"),
        (("export", "--from", "x", "--old-diffusers"), "--old-diffusers is about the decoder"),
        (("export", "--from", "absent.safetensors"), "absent.safetensors: no such prior"),
        (("preview", "--from", "x"), "there is nothing to draw: give --prompts FILE"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_line(arguments, message, capsys):
    assert run(*arguments) == 2

    assert message in capsys.readouterr().err


def test_a_picture_needs_a_prompt_a_decoder_and_a_text_model(models, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("sky --w 256 --h 256\n")
    weights = ("--from", models["stage_c"], "--prompts", prompts)

    assert run("preview", *weights) == 2
    assert "name a decoder pipeline with --decoder, or a --previewer" in capsys.readouterr().err
    assert run("preview", *weights, "--previewer", models["previewer"]) == 2
    assert "no text model in the weights or beside them" in capsys.readouterr().err
    prompts.write_text("[filewords]\n")
    assert run("preview", *weights, "--previewer", models["previewer"]) == 2
    assert "[filewords] stands for a caption of a run" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(models, tmp_path, capsys):
    output = tmp_path / "out"

    assert run("export", "--from", models["stage_c"], "--format", "combined", "--output", output, "--dry-run") == 0
    assert run("preview", "--from", models["stage_c"], "--output", output, "--dry-run") == 0

    assert f"would write combined to {output}" in capsys.readouterr().out
    assert not output.exists()
