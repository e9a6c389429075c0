"""The planner on Stable Diffusion: published sizes, files' own shapes, and what a real process takes."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.training.dreambooth.toy_sd import ATTENDED, UNETS, toy_text, toy_unet, toy_vae
from training.buckets import Bucket
from training.config import RunConfig
from training.dreambooth.single_file.layout import Parts, original_tensors
from training.memory.activations import pass_bytes
from training.memory.architecture import Pass, architecture_of, shapes_of
from training.memory.planner import Planner, strategy_of
from training.memory.report import state_bytes
from training.memory.sd_architecture import PUBLISHED_TEXTS, SdArchitecture, family_of_name

ROOT = Path(__file__).parents[2]
UNET = {
    "sample_size": 8, "block_out_channels": (64, 128), "layers_per_block": 1,
    "down_block_types": (ATTENDED[0], "DownBlock2D"), "up_block_types": ("UpBlock2D", ATTENDED[1]), **UNETS["sd1"],
}  # fmt: skip
VAE = {
    "block_out_channels": (32, 32), "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip
TEXT = dict(PUBLISHED_TEXTS["sd1"][0]) | {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 1, "projection_dim": 64,
}  # fmt: skip
TINY = SdArchitecture("sd1", UNET, VAE, (TEXT,))
SMALL_PASS = Pass(64, 64, 1, autocast=False, checkpointing=False, device="cpu")


def sd_config(model="runwayml/stable-diffusion-v1-5", *, dreambooth=None, **changes):
    values = {
        "name": "sd", "data": {"workspace": "none"}, "batch": {"batch_size": 4, "micro_batch_size": 2},
        "buckets": {"resolution": [512, 512], "family": "area", "max_side": 1024},
        "dreambooth": {"model": model, **(dreambooth or {})},
    }  # fmt: skip
    return RunConfig.model_validate(values | changes)


@pytest.mark.parametrize(
    ("name", "unet", "texts"),
    [
        ("runwayml/stable-diffusion-v1-5", 859_520_964, 123_060_480),
        ("stabilityai/stable-diffusion-2-1", 865_910_724, 340_387_840),
        ("stabilityai/stable-diffusion-xl-base-1.0", 2_567_463_684, 123_060_480 + 694_659_840),
    ],
)
def test_a_model_that_is_not_here_is_taken_for_the_published_one_of_that_name(name, unet, texts):
    architecture = architecture_of(sd_config(name))

    shapes = shapes_of(architecture)

    assert sum(shape.numel() for shape in shapes.trained.values()) == unet
    assert shapes.num_frozen == texts + 83_653_863
    assert "taken for" in architecture.assumed[0] and name in architecture.assumed[0]


def test_names_tell_families():
    names = ["anything-v3.safetensors", "hakurei/waifu-diffusion-v1-4", "sd_xl_base_1.0.safetensors", "v2-1_768.ckpt"]

    assert [family_of_name(name) for name in names] == ["sd1", "sd1", "sdxl", "sd2"]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_shapes_come_from_the_runs_own_folder_and_file(tmp_path, family):
    unet, vae = toy_unet(family), toy_vae()
    texts = [toy_text(), toy_text(projection=True, act="gelu")][: 1 + (family == "sdxl")]
    for name, part in zip(["unet", "vae", "text_encoder", "text_encoder_2"], [unet, vae, *texts], strict=False):
        part.save_pretrained(tmp_path / "folder" / name)
    parts = Parts(unet.state_dict(), vae.state_dict(), tuple(text.state_dict() for text in texts))
    tensors = {key: value.clone().contiguous() for key, value in original_tensors(family, parts).items()}
    save_file(tensors, tmp_path / "model.safetensors")

    for path in (tmp_path / "folder", tmp_path / "model.safetensors"):
        architecture = architecture_of(sd_config(str(path)))
        shapes = shapes_of(architecture)

        assert (architecture.family, architecture.assumed) == (family, ())
        assert shapes.trained == {f"unet.{name}": value.shape for name, value in unet.named_parameters()}
        own = sum(p.numel() for module in (vae, *texts) for p in module.parameters())
        assert shapes.num_frozen == own
        assert state_bytes(sd_config(str(path)))[0] == 3 * 4 * sum(p.numel() for p in unet.parameters())


def test_trained_parts_are_those_of_the_stage_that_trains_most():
    stages = [
        {"name": "text", "epochs": 2, "train": ["text_encoder"]},
        {"name": "both", "epochs": 2, "train": ["unet", "text_encoder"]},
        {"name": "unet", "epochs": 2, "train": ["unet"]},
    ]
    config = sd_config(dreambooth={"concepts": "c.toml", "stages": stages})

    trained = shapes_of(architecture_of(config)).trained

    assert sum(shape.numel() for shape in trained.values()) == 859_520_964 + 123_060_480


WITH_TEXT = replace(TINY, train=("unet", "text_encoder"), text_has_gradients=True)


def test_settings_change_what_is_in_memory():
    plain, both = shapes_of(TINY), shapes_of(WITH_TEXT)
    norms = shapes_of(replace(WITH_TEXT, freeze_clip_norms=True))
    earlier = shapes_of(replace(TINY, text_has_gradients=True))
    base = shapes_of(replace(TINY, keeps_base=True))

    assert set(both.trained) > set(plain.trained)
    assert any(name.startswith("text.texts.0.") for name in both.trained)
    assert both.num_frozen < plain.num_frozen
    assert len(both.trained) - len(norms.trained) == 2 * (2 * 3 + 1)
    assert earlier.trained == plain.trained and set(earlier.beside) == set(both.trained) - set(plain.trained)
    assert base.num_frozen - plain.num_frozen == sum(shape.numel() for shape in plain.trained.values())


def config_with_base(dtype):
    lora = {"targets": ["kohya"], "rank": 4, "text_encoder": {}, "base_weights": dtype}
    return sd_config(dreambooth={"train": ["unet", "text_encoder"]}, lora=lora)


def test_adapters_are_what_is_trained_of_a_lora():
    architecture = replace(WITH_TEXT, adapters=config_with_base("bf16"))

    shapes = shapes_of(architecture)

    assert all(".lora_" in name for name in shapes.trained) and not shapes.beside
    assert any(name.startswith("text.texts.0.") for name in shapes.trained)
    assert any("attentions.0.proj_in" in name for name in shapes.trained)
    assert not any("resnets" in name for name in shapes.trained)
    assert shapes.frozen_bytes < 4 * shapes.num_frozen  # the base is in bf16
    assert shapes == shapes_of(replace(architecture, adapters=config_with_base("fp16")))
    assert pass_bytes(architecture, replace(SMALL_PASS, autocast=True)).per_image > 0


def test_passes_are_as_large_as_settings_make_them():
    plain = pass_bytes(TINY, SMALL_PASS)

    assert plain.per_image > pass_bytes(TINY, replace(SMALL_PASS, checkpointing=True)).per_image
    assert pass_bytes(TINY, replace(SMALL_PASS, width=128)).per_image > 1.8 * plain.per_image
    assert plain.encode_per_image > 0 == pass_bytes(replace(TINY, encodes_pixels=False), SMALL_PASS).encode_per_image
    half = replace(TINY, vae_dtype="fp16")
    assert pass_bytes(half, SMALL_PASS).encode_per_image < plain.encode_per_image
    assert pass_bytes(replace(TINY, attention="sliced"), SMALL_PASS).per_image > plain.per_image
    on_gpu = replace(SMALL_PASS, device="gpu", autocast=True)
    assert pass_bytes(TINY, on_gpu).per_image < plain.per_image
    assert pass_bytes(TINY, on_gpu).fixed > 0  # casts of weights
    assert pass_bytes(WITH_TEXT, SMALL_PASS).per_image > plain.per_image
    assert (
        pass_bytes(WITH_TEXT, replace(SMALL_PASS, num_windows=3)).per_image
        > pass_bytes(WITH_TEXT, SMALL_PASS).per_image
    )


def test_sdxl_is_passed_through_with_its_size_and_pooled_text():
    text = {**TEXT, "hidden_act": "gelu"}
    unet = {**UNET, "down_block_types": ("DownBlock2D", ATTENDED[0]), "up_block_types": (ATTENDED[1], "UpBlock2D")}
    tiny = SdArchitecture("sdxl", {**unet, **UNETS["sdxl"]}, VAE, (TEXT, text), encodes_text=False)

    assert pass_bytes(tiny, SMALL_PASS).per_image > 0
    assert (
        pass_bytes(replace(tiny, text_has_gradients=True, train=("unet", "text_encoder_2")), SMALL_PASS).per_image > 0
    )


def test_a_planner_takes_a_dreambooth_run():
    planner = Planner(TINY, Bucket(64, 64), max_tokens=75)

    estimate = planner.estimate(strategy_of(sd_config(dreambooth={"gradient_checkpointing": True}), num_processes=1))

    assert estimate.strategy.checkpointing
    assert estimate.peak(2) > estimate.fixed.total > 0


MEASURE = """
import resource, sys, torch
from tests.training.test_memory_sd import UNET
from diffusers import UNet2DConditionModel

def peak(num_images):
    # A forward and backward pass on the CPU, fp32, on latents of 32 x 32, gradients kept.
    before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
    open("/proc/self/clear_refs", "w").write("5")
    x, t = torch.randn(num_images, 4, 32, 32), torch.zeros(num_images, dtype=torch.int64)
    (unet(x, t, torch.randn(num_images, 77, 64), return_dict=False)[0] - x).square().mean().backward()
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024 - before

torch.set_num_threads(1)
unet = UNet2DConditionModel(**UNET)
if sys.argv[1] == "True":
    unet.enable_gradient_checkpointing()
peak(1)
print(peak(2), peak(6))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure a peak")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_plan_is_within_a_tenth_of_what_a_real_process_takes(checkpointing):
    """Peak resident memory of 2 and 6 images; their difference is activations alone."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(checkpointing)], cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    two, six = map(int, done.stdout.split())

    settings = replace(SMALL_PASS, checkpointing=checkpointing)  # this VAE halves once
    planned = pass_bytes(replace(TINY, encodes_pixels=False, encodes_text=False), settings)

    assert 4 * planned.per_image == pytest.approx(six - two, rel=0.1)


def test_an_odd_model_is_refused_by_name(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(FileNotFoundError, match="whole diffusers folder"):
        architecture_of(sd_config(str(tmp_path / "model")))
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="no text model"):
        architecture_of(sd_config(str(tmp_path / "x.safetensors")))
