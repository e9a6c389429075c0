"""What an export holds: names, headers, licences, lost values; combined files; what comes with given weights."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from scripts.demo_models.stage_c import make_stage_c_models
from sharding.config import load_config
from training import weight_files
from training.config import RunConfig
from training.config.saving import SaveConfig
from training.exports import write_export
from training.inspect_run import inspect_plan
from training.stage_c.effnet import load_effnet
from training.stage_c.export import StageCWeights, export_stage_c
from training.stage_c.formats import load_stage_c
from training.stage_c.given_weights import find_text_model, load_given
from training.stage_c.layouts import from_original
from training.stage_c.modelspec import modelspec
from training.stage_c.previewer import load_previewer
from training.stage_c.text_files import load_text_model
from training.weight_files import WeightsError, write_tensors


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_stage_c_models(tmp_path_factory.mktemp("models"), seed=3)


@pytest.fixture(scope="module")
def weights(models) -> StageCWeights:
    given = load_given(models["stage_c"], text_encoder=str(models["text_encoder"]))
    return StageCWeights(
        network=given.network, text_model=given.text_model, tokenizer=given.tokenizer, text_is_trained=True,
        effnet=load_effnet(models["effnet"]), previewer=load_previewer(models["previewer"]),
    )  # fmt: skip


def export(weights, folder, *formats, dtype=torch.float32, header=None, **settings):
    save = SaveConfig(export_formats=formats, **settings)
    return export_stage_c(weights, folder, save=save, dtype=dtype, title="tiny", header=header or {})


def equal(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_a_combined_file_has_comfyuis_names_and_gives_all_four_models_back(weights, tmp_path):
    (file,) = export(weights, tmp_path, "combined")
    tensors = load_file(file.path)

    assert tensors.keys() >= {
        "model.diffusion_model.clf.1.weight",
        "model.diffusion_model.down_blocks.0.2.attention.attn.in_proj_weight",
        "text_encoder.clip_g.transformer.text_model.embeddings.token_embedding.weight",
        "text_encoder.clip_g.transformer.text_projection.weight",
        "vae.encoder.backbone.1.0.block.0.1.num_batches_tracked",
        "vae.encoder.mapper.0.weight",
        "vae.previewer.blocks.11.num_batches_tracked",
    }
    prefixes = ("model.diffusion_model.", "text_encoder.clip_g.transformer.", "vae.encoder.", "vae.previewer.")
    assert all(key.startswith(prefixes) for key in tensors)
    assert equal(load_stage_c(file.path).state_dict(), weights.network.state_dict())
    assert equal(load_text_model(file.path).state_dict(), weights.text_model.state_dict())
    assert equal(load_effnet(file.path).state_dict(), weights.effnet.state_dict())
    assert equal(load_previewer(file.path).state_dict(), weights.previewer.state_dict())


def test_a_combined_file_that_comfyui_saved_itself_is_read(weights, tmp_path):
    tensors = {
        f"model.diffusion_model.{key}": value.clone()
        for key, value in from_original(weights.network.state_dict(), "kohya").items()
    }
    save_file(tensors, tmp_path / "comfy.safetensors")

    loaded = load_stage_c(tmp_path / "comfy.safetensors", config=weights.network.config)

    assert equal(loaded.state_dict(), weights.network.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_encoder_and_previewer_stay_fp32_in_a_combined_file_and_the_rest_is_cast(weights, tmp_path, dtype):
    (file,) = export(weights, tmp_path, "combined", dtype=dtype)
    formats = {key.split(".")[0]: value.dtype for key, value in load_file(file.path).items() if "num_b" not in key}

    assert formats == {"model": dtype, "text_encoder": dtype, "vae": torch.float32}
    assert file.num_overflowed == 0


def test_every_format_counts_the_values_that_do_not_fit(weights, tmp_path):
    network = {key: value.clone() for key, value in weights.network.state_dict().items()}
    network["clf.1.bias"][:3] = torch.tensor([70_000.0, -1e6, 1e-9])
    changed = StageCWeights(
        network=weights.network, text_model=weights.text_model, tokenizer=weights.tokenizer, text_is_trained=False,
        network_tensors=network,
    )  # fmt: skip

    files = export(changed, tmp_path, "original", "combined", "diffusers", dtype=torch.float16)

    assert [file.path.name for file in files] == [
        "stage_c.safetensors", "combined.safetensors", "diffusion_pytorch_model.safetensors", "model.safetensors",
    ]  # fmt: skip
    assert [file.num_overflowed for file in files] == [2, 2, 2, 0]
    assert all(file.num_vanished >= 1 for file in files[:3])
    assert not (tmp_path / "text_model.safetensors").exists()


def test_headers_licences_and_the_config_for_single_files_are_written(weights, tmp_path):
    licence = tmp_path / "LICENSE.txt"
    licence.write_text("do what is right")
    header = modelspec(title="tiny", width=1024, height=768, extra={"author": "nobody", "date": "2026-01-31T12:00:00Z"})

    write_export(
        tmp_path / "out",
        lambda partial: export(weights, partial, "original", "diffusers", header={**header, "ss_steps": "7"}),
        licences=[licence],
    )

    assert header == {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-cascade",
        "modelspec.implementation": "https://github.com/Stability-AI/StableCascade",
        "modelspec.prediction_type": "epsilon",
        "modelspec.title": "tiny",
        "modelspec.resolution": "1024x768",
        "modelspec.author": "nobody",
        "modelspec.date": "2026-01-31T12:00:00Z",
    }
    for path in ("stage_c.safetensors", "diffusers/prior/diffusion_pytorch_model.safetensors"):
        with safe_open(tmp_path / "out" / path, framework="pt") as file:
            assert file.metadata().items() >= {**header, "ss_steps": "7", "format": "pt"}.items()
    for folder in (tmp_path / "out", tmp_path / "out" / "diffusers"):
        assert (folder / "LICENSE.txt").read_text() == "do what is right"
    config = json.loads((tmp_path / "out" / "stage_c_config" / "config.json").read_text())
    assert config["_class_name"] == "StableCascadeUNet"


def test_unknown_modelspec_entries_are_refused():
    with pytest.raises(ValueError, match="modelspec: autor cannot be given; known are title, author"):
        SaveConfig(modelspec={"autor": "x"})
    with pytest.raises(ValueError, match="autor"):
        modelspec(title="t", width=1, height=1, extra={"autor": "x"})


def test_what_the_disk_does_not_give_back_is_no_export(tmp_path, monkeypatch):
    real = weight_files.write_file

    def damaging(path, parts):
        written = real(path, parts)
        with path.open("r+b") as stream:
            stream.seek(-1, 2)
            stream.write(b"\x55")
        return written

    monkeypatch.setattr(weight_files, "write_file", damaging)

    with pytest.raises(
        WeightsError, match=r"w\.safetensors: 1 tensors read back differ .*first b; is the disk healthy"
    ):
        write_tensors(tmp_path / "w.safetensors", {"a": torch.zeros(3), "b": torch.ones(3)})
    assert list(tmp_path.iterdir()) == []


def test_not_a_number_is_written_and_compared_like_any_value(tmp_path):
    write_tensors(tmp_path / "w.safetensors", {"a": torch.tensor([float("nan"), 1.0])}, dtype=torch.bfloat16)

    assert load_file(tmp_path / "w.safetensors")["a"].isnan().tolist() == [True, False]


def test_the_text_model_of_given_weights_is_found_where_each_program_puts_it(weights, models, tmp_path):
    export(weights, tmp_path / "ours", "original", "combined", "diffusers")
    kohya = tmp_path / "kohya"
    kohya.mkdir()
    (kohya / "name.safetensors").symlink_to(tmp_path / "ours" / "stage_c.safetensors")
    (kohya / "name_text_model.safetensors").symlink_to(tmp_path / "ours" / "text_model.safetensors")
    (kohya / "alone.safetensors").symlink_to(tmp_path / "ours" / "stage_c.safetensors")

    for source, expected in (
        (tmp_path / "ours" / "stage_c.safetensors", tmp_path / "ours" / "text_model.safetensors"),
        (tmp_path / "ours", tmp_path / "ours" / "text_model.safetensors"),
        (tmp_path / "ours" / "combined.safetensors", tmp_path / "ours" / "combined.safetensors"),
        (tmp_path / "ours" / "diffusers", tmp_path / "ours" / "diffusers"),
        (kohya / "name.safetensors", kohya / "name_text_model.safetensors"),
        (kohya / "alone.safetensors", None),
        ("somebody/model", "somebody/model"),
    ):
        assert find_text_model(source) == expected
    for source in ("ours", "ours/combined.safetensors", "ours/diffusers"):
        given = load_given(tmp_path / source)
        assert given.has_own_text
        assert equal(given.network.state_dict(), weights.network.state_dict())
        assert equal(given.text_model.state_dict(), weights.text_model.state_dict())


def test_a_text_model_that_is_not_trained_is_found_in_the_formats_that_hold_one(weights, tmp_path):
    export(replace(weights, text_is_trained=False), tmp_path, "original", "combined", "diffusers")

    assert find_text_model(tmp_path) == tmp_path / "diffusers"
    assert equal(load_given(tmp_path).text_model.state_dict(), weights.text_model.state_dict())
    shutil.rmtree(tmp_path / "diffusers")
    assert find_text_model(tmp_path) == tmp_path / "combined.safetensors"
    assert equal(load_given(tmp_path).text_model.state_dict(), weights.text_model.state_dict())
    (tmp_path / "combined.safetensors").unlink()
    assert find_text_model(tmp_path) is None


def test_a_format_with_text_needs_a_text_model(models, tmp_path):
    given = load_given(models["stage_c"])
    alone = StageCWeights(
        network=given.network, text_model=given.text_model, tokenizer=given.tokenizer, text_is_trained=False
    )

    assert len(export(alone, tmp_path, "original")) == 1
    for name in ("combined", "diffusers"):
        with pytest.raises(ValueError, match="none came with the weights: --text-encoder"):
            export(alone, tmp_path, name)
    assert given.text_model is None


def test_a_missing_licence_file_is_named_before_a_run_starts(run_toml, tmp_path):
    config = load_config(run_toml, RunConfig, [f"save.licence_files=['{tmp_path / 'NONE'}']"])

    report = inspect_plan(config, None, chunk_name=None)

    assert f"save.licence_files: {tmp_path / 'NONE'}: no such file" in [finding.text for finding in report.refusals]


def test_number_formats_of_given_weights_are_kept_without_a_wish(weights, tmp_path):
    export(weights, tmp_path / "half", "original", dtype=torch.float16)
    given = load_given(tmp_path / "half", dtype=None)
    again = StageCWeights(
        network=given.network, text_model=given.text_model, tokenizer=given.tokenizer, text_is_trained=True
    )

    export(again, tmp_path / "again", "original", "diffusers", dtype=None)

    for name in ("stage_c.safetensors", "text_model.safetensors"):
        assert equal(load_file(tmp_path / "half" / name), load_file(tmp_path / "again" / name))
    config = json.loads((tmp_path / "again" / "diffusers" / "text_encoder" / "config.json").read_text())
    assert (
        "dtype" not in config
        and load_given(tmp_path / "again" / "diffusers", dtype=None).text_model.dtype == torch.float16
    )
