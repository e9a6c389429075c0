"""Stable Diffusion models from single files and folders, against the modules they were written from."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file

from tests.training.dreambooth.test_single_file import FULL_SIZE, TEXTS, same, toy_parts
from tests.training.dreambooth.toy_sd import toy_unet, toy_vae
from training.dreambooth.sd_models import folders
from training.dreambooth.sd_models.merged import merged_from
from training.dreambooth.sd_models.models import SdModel, load_sd, load_vae, model_digest
from training.dreambooth.sd_models.prediction import Prediction
from training.dreambooth.sd_models.shapes import unet_settings, vae_settings
from training.dreambooth.single_file.layout import TEXT_PREFIXES, UNET_PREFIX, VAE_PREFIX, Parts, original_tensors
from training.dreambooth.single_file.writing import MARKERS, write_single_file
from training.tensor_file import TensorFile
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
    assert found.get("upcast_attention", False) == (family == "sd2")
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
    told = load_sd(str(path), prediction="v_prediction", zero_terminal_snr=True).prediction
    assert told == Prediction("v_prediction", True, "dreambooth.prediction")


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


def test_no_tensor_is_read_for_its_shape(files, monkeypatch):
    read = []
    whole = TensorFile.tensor
    monkeypatch.setattr(TensorFile, "tensor", lambda file, name: read.append(name) or whole(file, name))

    load_sd(str(files / "sd1.safetensors"))

    assert len(read) == len(set(read)) > 300


def test_clip_l_is_read_under_the_names_of_novelai_s_file_and_written_under_those_of_today(files, tmp_path):
    prefix = TEXT_PREFIXES["sd1"][0][0]
    tensors = load_file(files / "sd1.safetensors")
    old = {key.replace(f"{prefix}text_model.", prefix): tensor for key, tensor in tensors.items()}
    save_file(old, tmp_path / "nai.safetensors")
    assert old.keys() != tensors.keys()

    model = load_sd(str(tmp_path / "nai.safetensors"))
    write_single_file(
        tmp_path / "new.safetensors", Parts(texts=(model.texts[0].state_dict(),)), family="sd1",
        source=tmp_path / "nai.safetensors",
    )  # fmt: skip

    assert same(model.texts[0].state_dict(), TEXTS["sd1"][0]().state_dict())
    assert same(load_file(tmp_path / "new.safetensors"), tensors)


def test_a_digest_is_of_the_weights_whatever_holds_them(files, tmp_path):
    write_single_file(tmp_path / "model.ckpt", toy_parts("sd1"), family="sd1")
    first, second = (load_sd(str(path)) for path in (files / "sd1.safetensors", tmp_path / "model.ckpt"))

    digest = model_digest(first)

    assert digest == model_digest(second) and len(digest) == 64
    for part in (first.unet.conv_in, second.vae.quant_conv, second.texts[0].get_input_embeddings()):
        with torch.no_grad():
            part.weight[0] += 1
    assert len({digest, model_digest(first), model_digest(second)}) == 3


def merged(name, **metadata):
    return merged_from(SdModel("sd1", None, None, (), Prediction("epsilon", False, ""), None, metadata, name=name))


@pytest.mark.parametrize(
    "name", ["OrangeMix2_hard", "pastelmix-fp16", "0.5(a) + 0.5(b)", "my_merged_v2", "meinamix_v11", "Frankenstein"]
)
def test_a_merge_is_suspected_by_its_name(name):
    assert f"its name {name!r} looks like" in merged(name)


@pytest.mark.parametrize("name", ["Anything-V3.0-pruned-fp32", "nai", "remixer", "emerged", "sd_xl_base_1.0"])
def test_other_names_say_nothing(name):
    assert merged(name) is None


def test_a_merge_is_known_by_its_header_or_its_readme(tmp_path):
    (tmp_path / "README.md").write_text("---\nbase_model: [a/b, c/d]\n---\n", "utf-8")
    models = json.dumps({"0f": {"name": "first.ckpt"}, "1a": {"name": "second.ckpt"}})

    assert "merged from x, y" in merged("base", **{"modelspec.merged_from": "x, y"})
    assert "first.ckpt, second.ckpt" in merged("base", sd_merge_models=models)
    assert "recipe" in merged("base", sd_merge_recipe="{}")
    assert "a/b, c/d" in merged(str(tmp_path))


def test_a_named_vae_is_a_hub_id_and_says_how_to_get_it(monkeypatch):
    asked = []

    def not_there(source, dtype):
        asked.append(source)
        raise OSError("no network")

    monkeypatch.setattr("training.dreambooth.sd_models.models.folder_vae", not_there)

    with pytest.raises(FileNotFoundError, match=r"'sdxl-fp16-fix' .*no network.*hf download madebyollin/sdxl-vae-fp16"):
        load_vae("sdxl-fp16-fix", like=SimpleNamespace(family="sdxl"))
    assert asked == ["madebyollin/sdxl-vae-fp16-fix"]


def test_a_vae_of_another_family_is_refused(tmp_path):
    toy_vae().save_pretrained(tmp_path / "vae")  # scaled by 0.18215

    assert load_vae(str(tmp_path), like=SimpleNamespace(family="sd1")).config.scaling_factor == 0.18215
    assert load_vae(str(tmp_path / "vae"), like=SimpleNamespace(family="sd2"))
    with pytest.raises(WeightsError, match=r"scaled by 0\.18215, those of sdxl by 0\.13025"):
        load_vae(str(tmp_path), like=SimpleNamespace(family="sdxl"))


def test_folders_of_inpainting_and_distilled_models_are_refused(tmp_path):
    for changes, problem in (({"in_channels": 9}, "inpainting"), ({"time_cond_proj_dim": 8}, "time_cond_proj_dim 8")):
        toy_unet("sd1", **changes).save_pretrained(tmp_path / "unet")

        with pytest.raises(WeightsError, match=problem):
            load_sd(str(tmp_path))


def test_files_of_other_families_and_builds_are_refused_by_name(files, tmp_path):
    others = {
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": "Stable Diffusion 3",
        "conditioner.embedders.0.model.ln_final.bias": "SDXL's refiner",
    }
    for key, name in others.items():
        save_file({key: torch.zeros(1)}, tmp_path / "other.safetensors")
        with pytest.raises(WeightsError, match=name):
            load_sd(str(tmp_path / "other.safetensors"))
    more = load_file(files / "sd1.safetensors") | {f"{UNET_PREFIX}time_embed.cond_proj.weight": torch.zeros(1)}
    save_file(more, tmp_path / "lcm.safetensors")
    with pytest.raises(WeightsError, match=r"1 tensors that .*cond_proj"):
        load_sd(str(tmp_path / "lcm.safetensors"))


def test_a_folder_with_a_part_that_is_not_whole_is_refused(tmp_path):
    toy_unet("sd1").save_pretrained(tmp_path / "unet")
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["conv_out.bias"]
    save_file(tensors, path)

    with pytest.raises(WeightsError, match=r"unet: 1 missing keys, first conv_out\.bias"):
        folders.folder_unet(str(tmp_path), torch.float32)


class Code:
    """What must not be loaded from a pickle."""


def test_a_ckpt_that_holds_more_than_tensors_is_refused(tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(1)}, "callbacks": Code()}, tmp_path / "old.ckpt")

    with pytest.raises(WeightsError, match=r"more than tensors.*\.safetensors"):
        load_sd(str(tmp_path / "old.ckpt"))
