"""Stable Diffusion models from single files and folders, against the modules they were written from."""

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file

from tests.training.dreambooth.test_single_file import FULL_SIZE, TEXTS, same, toy_parts
from tests.training.dreambooth.toy_sd import toy_unet, toy_vae
from training.dreambooth.sd_models.models import load_sd, load_vae
from training.dreambooth.sd_models.shapes import unet_settings, vae_settings
from training.dreambooth.single_file.layout import TEXT_PREFIXES, UNET_PREFIX, VAE_PREFIX, Parts, original_tensors
from training.dreambooth.single_file.writing import MARKERS, write_single_file
from training.weight_files import WeightsError

SAYS_V = {"modelspec.prediction_type": "v"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd")
    for family in FULL_SIZE:
        write_single_file(folder / f"{family}.safetensors", toy_parts(family), family=family, metadata=SAYS_V)
    return folder


def outputs(unet, vae, texts):
    """What a model makes of fixed inputs, part by part."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[49406, 320, 2368, *[49407] * 74]])
    with torch.no_grad():
        states = [text(ids, output_hidden_states=True).hidden_states[-1] for text in texts]
        context = torch.cat(states, dim=-1)
        added = {"text_embeds": torch.ones(1, 64), "time_ids": torch.arange(6.0)[None]}
        noisy = torch.randn(1, 4, 16, 16, generator=generator)
        picture = torch.rand(1, 3, 32, 32, generator=generator)
        return [
            unet(noisy, 500, encoder_hidden_states=context, added_cond_kwargs=added).sample,
            vae.encode(picture).latent_dist.mean,
            vae.decode(noisy).sample,
            *states,
        ]


@pytest.mark.parametrize("family", FULL_SIZE)
def test_a_single_file_loads_as_the_modules_it_was_written_from(family, files):
    model = load_sd(str(files / f"{family}.safetensors"))

    made = outputs(model.unet, model.vae, model.texts)
    wanted = outputs(toy_unet(family), toy_vae(), [make() for make in TEXTS[family]])

    assert model.family == family
    assert model.prediction.kind == "v_prediction"
    assert all(torch.equal(one, other) for one, other in zip(made, wanted, strict=True))


@pytest.mark.parametrize("family", FULL_SIZE)
def test_the_settings_of_the_full_size_are_read_off_its_shapes(family):
    from diffusers import AutoencoderKL, UNet2DConditionModel

    settings = FULL_SIZE[family][0]
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**settings), AutoencoderKL(**vae_of_full_size())
    tensors = original_tensors(family, Parts(unet=unet.state_dict(), vae=vae.state_dict()))
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    shapes[f"{TEXT_PREFIXES['sdxl'][1][0]}text_projection"] = (1280, 1280)

    found = unet_settings(shapes, family)

    assert {key: found[key] for key in settings} == settings
    assert {key: value for key, value in vae_settings(shapes, family).items() if key in vae_of_full_size()} == (
        vae_of_full_size()
    )


def vae_of_full_size():
    return {
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }


def test_a_ckpt_and_a_diffusers_folder_load_the_same(files, tmp_path):
    write_single_file(tmp_path / "model.ckpt", toy_parts("sdxl"), family="sdxl")
    first = load_sd(str(tmp_path / "model.ckpt"))
    first.unet.save_pretrained(tmp_path / "folder" / "unet")
    first.vae.save_pretrained(tmp_path / "folder" / "vae")
    for name, text in zip(("text_encoder", "text_encoder_2"), first.texts, strict=True):
        text.save_pretrained(tmp_path / "folder" / name)
    DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True).save_pretrained(
        tmp_path / "folder" / "scheduler"
    )

    second = load_sd(str(tmp_path / "folder"))

    assert (first.family, first.prediction.kind) == ("sdxl", "epsilon")
    assert (second.family, second.prediction.kind, second.prediction.zero_terminal_snr) == (
        "sdxl", "v_prediction", True,
    )  # fmt: skip
    for one, other in zip((first.unet, first.vae, *first.texts), (second.unet, second.vae, *second.texts), strict=True):
        assert same(one.state_dict(), other.state_dict())


@pytest.mark.parametrize("middle", ["diffusion_model", ""], ids=["LDM's names", "the extension's names"])
def test_the_running_average_of_a_file_is_taken_when_asked_for(files, tmp_path, middle):
    tensors = load_file(files / "sd1.safetensors")
    averages = {
        f"model_ema.{middle}{key.removeprefix(UNET_PREFIX).replace('.', '')}": tensor + 1
        for key, tensor in tensors.items()
        if key.startswith(UNET_PREFIX)
    }
    save_file(tensors | averages, tmp_path / "both.safetensors")

    plain, averaged = (load_sd(str(tmp_path / "both.safetensors"), extract_ema=ema).unet for ema in (False, True))

    assert torch.equal(averaged.conv_in.weight, plain.conv_in.weight + 1)
    with pytest.raises(WeightsError, match="no running average"):
        load_sd(str(files / "sd1.safetensors"), extract_ema=True)


def test_markers_say_what_an_sdxl_predicts(tmp_path):
    path = tmp_path / "model.safetensors"
    write_single_file(path, toy_parts("sdxl"), family="sdxl", markers=MARKERS)

    prediction = load_sd(str(path)).prediction

    assert (prediction.kind, prediction.zero_terminal_snr) == ("v_prediction", True)


def test_an_sd2_that_says_nothing_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    write_single_file(path, toy_parts("sd2"), family="sd2")

    with pytest.raises(WeightsError, match=r"dreambooth\.prediction"):
        load_sd(str(path))


@pytest.mark.parametrize("whole", [True, False], ids=["whole file", "bare VAE"])
def test_another_vae_is_read_from_a_file(files, tmp_path, whole):
    model, path = load_sd(str(files / "sd1.safetensors")), tmp_path / "vae.safetensors"
    tensors = load_file(files / "sd1.safetensors")
    own = {key: tensor * 2 for key, tensor in tensors.items() if key.startswith(VAE_PREFIX)}
    save_file(own if whole else {key.removeprefix(VAE_PREFIX): tensor for key, tensor in own.items()}, path)

    vae = load_vae(str(path), like=model)

    assert torch.equal(vae.quant_conv.weight, model.vae.quant_conv.weight * 2)


def test_inpainting_models_and_other_files_are_refused_with_what_they_are(files, tmp_path):
    tensors = load_file(files / "sd1.safetensors")
    first = f"{UNET_PREFIX}input_blocks.0.0.weight"
    save_file({**tensors, first: torch.zeros(64, 9, 3, 3)}, tmp_path / "inpainting.safetensors")
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")

    with pytest.raises(WeightsError, match="inpainting"):
        load_sd(str(tmp_path / "inpainting.safetensors"))
    with pytest.raises(WeightsError, match="lora_unet_x"):
        load_sd(str(tmp_path / "lora.safetensors"))
    with pytest.raises(FileNotFoundError, match="diffusers folder or a hub id"):
        load_sd(str(tmp_path / "nothing here"))
    del tensors[f"{UNET_PREFIX}out.2.bias"]
    save_file(tensors, tmp_path / "cut.safetensors")
    with pytest.raises(WeightsError, match=r"1 of \d+ keys are missing"):
        load_sd(str(tmp_path / "cut.safetensors"))
