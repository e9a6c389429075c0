"""The original single-file layout, against diffusers' own reader of it."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file, save_file

from tests.training.dreambooth.toy_sd import toy_text, toy_unet, toy_vae
from training.dreambooth.single_file.layout import EMA_PREFIX, UNET_PREFIX, VAE_PREFIX, Parts, original_tensors
from training.dreambooth.single_file.text_names import with_prefix
from training.dreambooth.single_file.unet_names import unet_names
from training.dreambooth.single_file.vae_names import vae_names
from training.dreambooth.single_file.writing import MARKERS, write_single_file
from training.weight_files import WeightsError

FULL_SIZE = {
    "sd1": ({"cross_attention_dim": 768, "attention_head_dim": 8}, 686, 859_520_964),
    "sd2": (
        {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
        686,
        865_910_724,
    ),
    "sdxl": (
        {
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "use_linear_projection": True,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": [1, 2, 10],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        1680,
        2_567_463_684,
    ),
}
TEXTS = {
    "sd1": (toy_text,),
    "sd2": (lambda: toy_text(act="gelu"),),
    "sdxl": (toy_text, lambda: toy_text(projection=True, act="gelu")),
}


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def toy_parts(family):
    texts = tuple(make().state_dict() for make in TEXTS[family])
    return Parts(unet=toy_unet(family).state_dict(), vae=toy_vae().state_dict(), texts=texts)


@pytest.mark.parametrize("family", FULL_SIZE)
def test_every_parameter_of_the_full_size_unet_gets_the_name_that_diffusers_reads_it_from(family):
    settings, num_keys, num_parameters = FULL_SIZE[family]
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, **settings)
    own = unet.state_dict()

    original = original_tensors(family, Parts(unet=own))
    back = convert_ldm_unet_checkpoint(dict(original), dict(unet.config))

    assert len(original) == num_keys and sum(tensor.numel() for tensor in own.values()) == num_parameters
    assert back.keys() == own.keys() and all(back[key] is own[key] for key in own)


def test_every_parameter_of_the_full_size_vae_gets_the_name_that_diffusers_reads_it_from():
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
    own = vae.state_dict()

    original = original_tensors("sd1", Parts(vae=own))
    back = convert_ldm_vae_checkpoint(dict(original), dict(vae.config))

    assert len(original) == 248
    assert original[f"{VAE_PREFIX}encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    assert {key: tensor.shape for key, tensor in back.items()} == {key: tensor.shape for key, tensor in own.items()}


@pytest.mark.parametrize("family", FULL_SIZE)
def test_a_written_file_gives_every_part_back_bit_for_bit(family, tmp_path):
    parts = toy_parts(family)
    path = tmp_path / "model.safetensors"

    write_single_file(path, parts, family=family)

    tensors = load_file(path)
    assert same(convert_ldm_unet_checkpoint(dict(tensors), dict(toy_unet(family).config)), parts.unet)
    assert same(convert_ldm_vae_checkpoint(dict(tensors), dict(toy_vae().config)), parts.vae)
    if family == "sd2":
        text = convert_open_clip_checkpoint(TEXTS[family][0](), tensors, prefix="cond_stage_model.model.")
        wanted = with_prefix(parts.texts[0])
        assert same({key: text[key] for key in text if key in wanted}, wanted)
    if family == "sdxl":
        text = convert_open_clip_checkpoint(TEXTS[family][1](), tensors, prefix="conditioner.embedders.1.model.")
        assert same({key: text[key] for key in parts.texts[1]}, parts.texts[1])


def test_an_overlay_keeps_what_the_source_has_besides(tmp_path):
    source, path = tmp_path / "source.safetensors", tmp_path / "trained.safetensors"
    write_single_file(source, toy_parts("sd1"), family="sd1")
    tensors = load_file(source)
    extra = {"betas": torch.rand(4), "model_ema.decay": torch.rand(1), "v_pred": torch.empty(0)}
    save_file(tensors | extra, source, {"modelspec.title": "base"})
    trained = {key: tensor + 1 for key, tensor in toy_unet("sd1").state_dict().items()}

    report = write_single_file(path, Parts(unet=trained), family="sd1", source=source, dtype=torch.float16)

    written = load_file(path)
    assert written.keys() == (tensors.keys() | {"betas", "v_pred"})
    assert not any(key.startswith(EMA_PREFIX) for key in written)
    assert torch.equal(written[f"{UNET_PREFIX}out.2.bias"], (tensors[f"{UNET_PREFIX}out.2.bias"] + 1).half())
    assert written["cond_stage_model.transformer.text_model.embeddings.position_ids"].dtype == torch.int64
    assert report.num_overflowed == 0


def test_an_overlay_on_another_model_is_refused(tmp_path):
    source = tmp_path / "source.safetensors"
    write_single_file(source, toy_parts("sd1"), family="sd1")
    other = toy_unet("sd1", block_out_channels=(32, 32)).state_dict()

    with pytest.raises(WeightsError, match="not the file that this training started from"):
        write_single_file(tmp_path / "x.safetensors", Parts(unet=other), family="sd1", source=source)
    with pytest.raises(WeightsError, match="not the file that this training started from"):
        write_single_file(
            tmp_path / "x.safetensors", Parts(unet=toy_unet("sdxl").state_dict()), family="sdxl", source=source
        )
    assert not (tmp_path / "x.safetensors").exists()


def test_a_ckpt_holds_the_same_and_loads_without_running_code(tmp_path):
    parts, path = toy_parts("sd2"), tmp_path / "model.ckpt"

    write_single_file(path, parts, family="sd2", dtype=torch.bfloat16)
    write_single_file(tmp_path / "model.safetensors", parts, family="sd2", dtype=torch.bfloat16)

    assert same(torch.load(path, weights_only=True)["state_dict"], load_file(tmp_path / "model.safetensors"))


def test_markers_of_v_prediction_are_written(tmp_path):
    path = tmp_path / "model.safetensors"

    write_single_file(path, toy_parts("sdxl"), family="sdxl", markers=MARKERS)

    assert set(MARKERS) <= load_file(path).keys()


@pytest.mark.parametrize("names", [unet_names, vae_names])
def test_a_parameter_of_another_model_is_an_error(names):
    with pytest.raises(ValueError, match="has this parameter"):
        names(["decoder.up_blocks.0.resnets.0.conv1.weight", "transformer_blocks.0.x"])
