"""Exports of Stable Diffusion models: what other programs read is what was trained."""

import hashlib
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.training.dreambooth.test_single_file import FULL_SIZE, same, toy_parts
from tests.training.dreambooth.toy_sd import toy_text, toy_unet, toy_vae
from training.config.saving import formats_of
from training.dreambooth.export.content import SdWeights
from training.dreambooth.export.export import export_sd
from training.dreambooth.export.header import sd_modelspec
from training.dreambooth.export.model_card import write_sd_card
from training.dreambooth.export.verify import ExportMismatchError, verify_export
from training.dreambooth.sd_models.models import load_sd
from training.dreambooth.single_file.layout import (
    EMA_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    Parts,
    filled_up,
    original_tensors,
)
from training.dreambooth.single_file.writing import MARKERS, write_single_file
from training.recipes.base import ExportFile
from training.stage_c.model_card import read_front_matter
from training.stage_c.text import load_tokenizer
from training.weight_files import WeightsError

PUBLISHED = {
    "sd1": (1131, "6526f487a98afe4c81660ebe6391558c4e38c52cbf4236b255cecbf877bd88f4"),
    "sd2": (1228, "e84fbdb09e320380e4e2c3e1dc60118c57a4104bceb3139c2216f9aa76cd346d"),
    "sdxl": (2515, "3417e4dabcea9327d05c3c560dcc9c94b4ce22e074aee74af19b311d2f607a16"),
    "average": (686, "277ab37414b7890887ae70a98a73ee56ca3dd3390698496d75665ca170d0b4d3"),
}
"""Number and SHA-256 of the sorted lines `name shape` of all tensors in the published files (SD 1.5, SD 2.1, SDXL 1.0),
and of the names of SD 1's running average, taken from other people's lists of them."""
PIPELINES = {"sd1": StableDiffusionPipeline, "sd2": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
IDS = torch.tensor([[49406, 320, 2368, *[49407] * 74]])
EXTRA = {"betas": torch.rand(4, dtype=torch.float64), "steps": torch.tensor([7]), "odd": torch.rand(3).half()}


def listed(lines):
    lines = sorted(lines)
    return len(lines), hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("builtin")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A single file of each family, with tensors that nobody knows and an average from before."""
    folder = tmp_path_factory.mktemp("sources")
    for family in FULL_SIZE:
        path = folder / f"{family}.safetensors"
        write_single_file(path, parts_of(family), family=family)
        stale = {f"{EMA_PREFIX}decay": torch.rand(1), f"{EMA_PREFIX}num_updates": torch.tensor(9)}
        header = {"modelspec.license": "CreativeML", "modelspec.title": "base", "ss_tag_frequency": "{}"}
        save_file(load_file(path) | EXTRA | stale, path, header)
    return folder


def parts_of(family):
    """Toys; of SDXL with text models of two widths, by which diffusers tells them apart."""
    if family != "sdxl":
        return toy_parts(family)
    texts = (toy_text(width=32), toy_text(projection=True, act="gelu"))
    unet = toy_unet("sdxl", cross_attention_dim=96)
    return Parts(unet.state_dict(), toy_vae().state_dict(), tuple(text.state_dict() for text in texts))


def trained(family, sources, tokenizer):
    """A model whose UNet and first text model were trained."""
    prediction = "v_prediction" if family == "sdxl" else "epsilon"
    model = load_sd(str(sources / f"{family}.safetensors"), prediction=prediction, zero_terminal_snr=family == "sdxl")
    unet, text = (
        {key: tensor + 0.01 * tensor.std().nan_to_num() for key, tensor in module.state_dict().items()}
        for module in (model.unet, model.texts[0])
    )
    return SdWeights(model, tokenizer, unet=unet, texts=(text,))


def export(content, folder, *formats, dtype=torch.float32):
    entries = sd_modelspec(content.model, title="sote", width=640, height=512)
    return export_sd(content, folder, formats=formats, dtype=dtype, title="sote", header=entries)


@pytest.fixture(scope="module")
def exported(sources, tokenizer, tmp_path_factory):
    """Every family in every format, and what was exported."""
    made = {}
    for family in FULL_SIZE:
        content, folder = trained(family, sources, tokenizer), tmp_path_factory.mktemp(family)
        export(content, folder, *formats_of("dreambooth"))
        made[family] = content, folder
    return made


def outputs(unet, texts):
    with torch.no_grad():
        states = [text(IDS, output_hidden_states=True).hidden_states[-1] for text in texts]
        noisy = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        added = {"text_embeds": torch.ones(1, 64), "time_ids": torch.arange(6.0)[None]}
        context = torch.cat(states, dim=-1)
        return [unet(noisy, 500, encoder_hidden_states=context, added_cond_kwargs=added).sample, *states]


def outputs_of(content):
    """What the trained weights make of fixed inputs."""
    model = content.model
    model.unet.load_state_dict(content.unet)
    model.texts[0].load_state_dict(content.texts[0])
    return outputs(model.unet, model.texts)


@pytest.mark.parametrize("family", FULL_SIZE)
@pytest.mark.parametrize("form", ["model.safetensors", "model.ckpt", "diffusers"])
def test_diffusers_reads_an_export_and_makes_the_same_of_it(family, form, exported):
    content, folder = exported[family]
    kind = PIPELINES[family]

    if form == "diffusers":
        pipe = kind.from_pretrained(folder / form, local_files_only=True)
    else:
        pipe = kind.from_single_file(folder / form, config=str(folder / "diffusers"), local_files_only=True)

    texts = [pipe.text_encoder] + ([pipe.text_encoder_2] if family == "sdxl" else [])
    # The last bits of a product depend on where in memory its factors lie.
    torch.testing.assert_close(outputs(pipe.unet, texts), outputs_of(content), rtol=0, atol=1e-5)
    assert same(dict(pipe.unet.state_dict()), content.unet)
    assert same(dict(pipe.vae.state_dict()), content.model.vae.state_dict())
    assert pipe.scheduler.config.prediction_type == ("v_prediction" if family == "sdxl" else "epsilon")
    assert pipe.scheduler.config.rescale_betas_zero_snr == (family == "sdxl")
    assert pipe.scheduler.config.timestep_spacing == ("trailing" if family == "sdxl" else "leading")
    assert pipe.tokenizer.pad_token_id == (0 if family == "sd2" else 49407)


@pytest.mark.parametrize("family", FULL_SIZE)
def test_every_key_of_a_single_file_is_a_part_s_or_known_to_be_unused(family, exported):
    content, folder = exported[family]
    sizes = {
        UNET_PREFIX: len(content.unet),
        VAE_PREFIX: len(content.model.vae.state_dict()),
        "cond_stage_model." if family != "sdxl" else "conditioner.": None,
    }

    keys = load_file(folder / "model.safetensors").keys()

    for prefix, size in sizes.items():
        assert size is None or sum(key.startswith(prefix) for key in keys) == size
    markers = set(MARKERS) if family == "sdxl" else set()
    assert {key for key in keys if not key.startswith(tuple(sizes))} == EXTRA.keys() | markers


def full_size_text(kind, width, inner, layers):
    with torch.device("meta"):
        config = CLIPTextConfig(
            hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=width // 64,
            projection_dim=width,
        )  # fmt: skip
        return kind(config).state_dict()


CLIP_L = (CLIPTextModel, 768, 3072, 12)
FULL_SIZE_TEXTS = {
    "sd1": [CLIP_L],
    "sd2": [(CLIPTextModel, 1024, 4096, 23)],
    "sdxl": [CLIP_L, (CLIPTextModelWithProjection, 1280, 5120, 32)],
}


@pytest.mark.parametrize("family", FULL_SIZE)
def test_names_and_shapes_of_the_full_size_are_those_of_the_published_file(family):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**FULL_SIZE[family][0]).state_dict()
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ).state_dict()  # fmt: skip
    texts = tuple(full_size_text(*one) for one in FULL_SIZE_TEXTS[family])

    tensors = filled_up(family, original_tensors(family, Parts(unet=unet, vae=vae, texts=texts)))

    assert listed(f"{key} {list(tensor.shape)}" for key, tensor in tensors.items()) == PUBLISHED[family]
    if family == "sd1":
        names = original_tensors(family, Parts(average=unet)).keys()
        prefix = f"{EMA_PREFIX}diffusion_model"
        assert all(name.startswith(prefix) for name in names)
        assert listed(name.removeprefix(prefix) for name in names) == PUBLISHED["average"]


def test_an_overlay_keeps_what_it_does_not_know_bit_for_bit_and_drops_the_old_average(exported, sources):
    _, folder = exported["sd1"]

    written, source = load_file(folder / "model.safetensors"), load_file(sources / "sd1.safetensors")

    assert written["steps"].dtype == torch.int64 and torch.equal(written["steps"], source["steps"])
    assert torch.equal(written["odd"], source["odd"].float())
    assert not any(key.startswith(EMA_PREFIX) for key in written)
    untouched = [key for key in source if key.startswith(VAE_PREFIX)]
    assert all(torch.equal(written[key], source[key]) for key in untouched)
    with safe_open(folder / "model.safetensors", "pt") as file:
        header = file.metadata()
    assert header["modelspec.license"] == "CreativeML" and header["modelspec.title"] == "sote"
    assert not any(key.startswith("ss_") for key in header)


def test_the_header_tells_what_it_is_and_the_hash_of_its_tensors(exported):
    wanted = {
        "sd1": ("stable-diffusion-v1", "epsilon"),
        "sd2": ("stable-diffusion-v2-512", "epsilon"),
        "sdxl": ("stable-diffusion-xl-v1-base", "v"),
    }
    for family, (architecture, prediction) in wanted.items():
        path = exported[family][1] / "model.safetensors"
        with safe_open(path, "pt") as file:
            header = file.metadata()
        data = path.read_bytes()
        tensors = data[8 + int.from_bytes(data[:8], "little") :]

        assert header["modelspec.architecture"] == architecture
        assert header["modelspec.prediction_type"] == prediction
        assert header["modelspec.resolution"] == "640x512"
        assert header["modelspec.hash_sha256"] == f"0x{hashlib.sha256(tensors).hexdigest()}"


def test_an_export_says_what_it_predicts_also_without_a_header_from_the_run(sources, tokenizer, tmp_path):
    content = trained("sd2", sources, tokenizer)

    wrong = {"modelspec.architecture": "stable-cascade"}
    export_sd(content, tmp_path, formats=["original"], dtype=torch.float16, title="sote", header=wrong)

    model = load_sd(str(tmp_path / "model.safetensors"))
    assert model.prediction.kind == "epsilon" and model.metadata["modelspec.resolution"] == "768x768"
    assert model.metadata["modelspec.architecture"] == "stable-diffusion-v2-512"


def test_no_path_of_this_machine_gets_out(exported, sources):
    for _, folder in exported.values():
        for path in folder.rglob("*"):
            if path.is_file() and path.suffix != ".ckpt":
                assert str(sources.parent).encode() not in path.read_bytes(), path


def test_half_is_counted_and_integers_stay(sources, tokenizer, tmp_path):
    content = trained("sd1", sources, tokenizer)
    content.unet["conv_in.bias"][0], content.unet["conv_in.bias"][1] = 1e6, 1e-9

    first, second = export(content, tmp_path, "original", "ckpt", dtype=torch.float16)

    assert (first.num_overflowed, second.num_overflowed) == (1, 1)
    assert first.num_vanished == second.num_vanished >= 1
    written = load_file(tmp_path / "model.safetensors")
    assert same(torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"], written)
    assert {tensor.dtype for tensor in written.values()} == {torch.float16, torch.int64}


def test_an_average_is_written_beside_and_extracted_again(sources, exported, tokenizer, tmp_path):
    content = trained("sd1", sources, tokenizer)
    average = {key: tensor + 1 for key, tensor in content.unet.items()}

    export(replace(content, average=average), tmp_path, "original")

    plain, averaged = (load_sd(str(tmp_path / "model.safetensors"), extract_ema=ema) for ema in (False, True))
    assert same(plain.unet.state_dict(), content.unet)
    assert same(averaged.unet.state_dict(), average) and averaged.is_average
    theirs = StableDiffusionPipeline.from_single_file(
        tmp_path / "model.safetensors",
        config=str(exported["sd1"][1] / "diffusers"),
        local_files_only=True,
        extract_ema=True,
    )
    assert same(theirs.unet.state_dict(), average)


def test_a_model_loaded_as_its_average_is_exported_so_even_if_only_text_was_trained(sources, tokenizer, tmp_path):
    content = trained("sd1", sources, tokenizer)
    both = tmp_path / "both"
    export(replace(content, average={key: one + 1 for key, one in content.unet.items()}), both, "original")
    averaged = load_sd(str(both / "model.safetensors"), extract_ema=True)

    export(replace(content, model=averaged, unet=None), tmp_path, "original")

    written = load_sd(str(tmp_path / "model.safetensors"))
    assert same(written.unet.state_dict(), averaged.unet.state_dict())


def test_another_vae_is_written_into_the_file_also_one_that_had_none(sources, tokenizer, tmp_path):
    other = {key: tensor * 2 for key, tensor in toy_parts("sd1").vae.items()}
    write_single_file(tmp_path / "vae.safetensors", Parts(vae=other), family="sd1")
    bare = {key: one for key, one in load_file(sources / "sd1.safetensors").items() if not key.startswith(VAE_PREFIX)}
    save_file(bare, tmp_path / "sd1.safetensors")
    with pytest.raises(WeightsError, match=r"no VAE; name one"):
        load_sd(str(tmp_path / "sd1.safetensors"))

    for source in (sources, tmp_path):
        model = load_sd(str(source / "sd1.safetensors"), vae=str(tmp_path / "vae.safetensors"))
        export(SdWeights(model, tokenizer), tmp_path / "out", "original")

        assert same(load_sd(str(tmp_path / "out" / "model.safetensors")).vae.state_dict(), other)


def test_a_folder_becomes_a_whole_file(exported, tokenizer, tmp_path):
    content, folder = exported["sd2"]
    model = load_sd(str(folder / "diffusers"))

    export(SdWeights(model, tokenizer), tmp_path, "original")

    tensors = load_file(tmp_path / "model.safetensors")
    assert "cond_stage_model.model.transformer.resblocks.3.ln_1.weight" in tensors  # toys have three layers, files four
    assert same(load_sd(str(tmp_path / "model.safetensors")).unet.state_dict(), content.unet)


def test_markers_follow_what_was_trained_not_the_source(sources, tokenizer, tmp_path):
    marked = tmp_path / "marked.safetensors"
    write_single_file(marked, toy_parts("sdxl"), family="sdxl", markers=MARKERS)
    model = load_sd(str(marked), prediction="epsilon")

    export(SdWeights(model, tokenizer), tmp_path, "original")

    assert load_sd(str(marked)).prediction.zero_terminal_snr
    assert not set(MARKERS) & load_file(tmp_path / "model.safetensors").keys()


def test_the_readme_says_how_to_use_it_and_clip_skip_as_diffusers_counts_it(tmp_path):
    header = {"modelspec.resolution": "640x512", "modelspec.encoder_layer": "2", "chunkline.steps": "7"}
    front = {"license": "other", "tags": ("anime",)}

    write_sd_card(tmp_path / "README.md", family="sd1", title="sote", dtype_name="float16", header=header, front=front)

    text = (tmp_path / "README.md").read_text("utf-8")
    assert "clip_skip=1," in text and "width=640" in text and "- steps: 7" in text and "torch.float16" in text
    assert {"license": "other", "tags": ["anime"]}.items() <= read_front_matter(tmp_path / "README.md").items()


def spoil_bytes(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{UNET_PREFIX}out.2.bias"][0] += 1e-4
    save_file(tensors, path)
    return path, r"unet: conv_out.bias differs: by up to 0.0001"


def spoil_text(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["cond_stage_model.transformer.text_model.final_layer_norm.bias"] *= 2
    tensors["cond_stage_model.transformer.text_model.final_layer_norm.bias"] += 1
    save_file(tensors, path)
    return path, "text_encoder: .*final_layer_norm.bias differs"


def spoil_settings(folder):
    path = folder / "diffusers" / "text_encoder" / "config.json"
    path.write_text(path.read_text("utf-8").replace("quick_gelu", "relu"), "utf-8")
    return folder / "diffusers", "text_encoder: outputs differ: by up to"


def spoil_scheduler(folder):
    path = folder / "diffusers" / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text("utf-8").replace("epsilon", "v_prediction"), "utf-8")
    return folder / "diffusers", "says prediction"


def spoil_file(folder):
    path = folder / "model.ckpt"
    path.write_bytes(path.read_bytes()[:10_000])
    return path, "cannot be read back"


@pytest.mark.parametrize("spoil", [spoil_bytes, spoil_text, spoil_settings, spoil_scheduler, spoil_file])
def test_an_export_that_differs_is_named_and_removed(spoil, exported, tmp_path):
    content, folder = exported["sd1"]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)

    path, problem = spoil(tmp_path)

    with pytest.raises(ExportMismatchError, match=problem) as raised:
        verify_export([ExportFile(path)], content, dtype=torch.float32)
    assert str(path) in str(raised.value) and not path.exists()


def test_a_module_that_was_trained_but_not_given_does_not_pass(sources, tokenizer, tmp_path):
    content = trained("sd1", sources, tokenizer)
    with torch.no_grad():
        content.model.unet.conv_out.bias += 1

    with pytest.raises(ExportMismatchError, match=r"unet: conv_out\.bias differs"):
        export(replace(content, unet=None), tmp_path, "original")
    assert not (tmp_path / "model.safetensors").exists()


def test_a_frozen_part_may_be_held_in_another_format_than_the_source_s(sources, tokenizer, tmp_path):
    content = trained("sd1", sources, tokenizer)
    content.model.texts[0].to(torch.bfloat16)

    export(replace(content, texts=()), tmp_path, "original", dtype=torch.float16)

    written, source = load_file(tmp_path / "model.safetensors"), load_file(sources / "sd1.safetensors")
    text = [key for key in source if key.startswith("cond_stage_model.") and source[key].is_floating_point()]
    assert len(text) > 20 and all(torch.equal(written[key], source[key].half()) for key in text)


def test_a_format_of_another_recipe_is_refused(sources, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="combined: dreambooth writes original, ckpt and diffusers"):
        export(trained("sd1", sources, tokenizer), tmp_path, "combined")
    assert "combined" in formats_of("stage_c") and "combined" not in formats_of("dreambooth")
