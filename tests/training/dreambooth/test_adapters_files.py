"""Files of adapters and tokens: diffusers loads them with equal outputs, and names are those of the naming rule."""

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import inject_adapter_in_model  # noqa: F401 - imported here, so that no test's time counts it
from safetensors.torch import load_file, safe_open
from transformers import CLIPTextConfig, CLIPTextModel

from tests.training.dreambooth.toy_adapters import KINDS, adapted, predict, shake, toy_networks
from tests.training.dreambooth.toy_sd import toy_vae
from training.dreambooth.adapters.export import export_adapters
from training.dreambooth.adapters.files import DIFFUSERS_FILE, KOHYA_FILE, read_adapters
from training.dreambooth.adapters.names import expanded, kohya_names
from training.lora.layers import adaptable, chosen
from training.lora.peft_folder import write_peft
from training.stage_c.text import load_tokenizer

ALL = {"sd1": ("unet", "text_encoder"), "sd2": ("unet", "text_encoder"),
       "sdxl": ("unet", "text_encoder", "text_encoder_2")}  # fmt: skip
TEXT = {"rank": 2, "alpha": 3.0}
ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-768-v",
    "sdxl": "stable-diffusion-xl-v1-base",
}
FILES = {"kohya": KOHYA_FILE, "diffusers": DIFFUSERS_FILE}


def exported(family, folder, *, predicts_v=False, header=None, dtype=torch.float32, save=None, **changes):
    """Return (model, adapters, tokenizer, files) of toy networks that were shaken and exported."""
    config, model, adapters, tokenizer = adapted(family, save=save or {}, **changes)
    shake(model)
    header = {"modelspec.architecture": ARCHITECTURES[family], **(header or {})}
    files = export_adapters(
        adapters, folder, config=config, tokenizer=tokenizer, family=family, dtype=dtype, header=header,
        weights=model.state_dict(), predicts_v=predicts_v,
    )  # fmt: skip
    return model, adapters, tokenizer, files


def pipeline(networks):
    """Return diffusers' pipeline of plain networks."""
    tokenizer, texts = load_tokenizer("builtin"), networks.text.texts
    shared = {
        "vae": toy_vae(), "text_encoder": texts[0], "tokenizer": tokenizer, "unet": networks.unet,
        "scheduler": DDIMScheduler(),
    }  # fmt: skip
    if len(texts) == 2:
        return StableDiffusionXLPipeline(
            **shared, text_encoder_2=texts[1], tokenizer_2=load_tokenizer("builtin"), add_watermarker=False
        )
    return StableDiffusionPipeline(**shared, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def num_loaded(networks):
    """Return how many tensors of adapters there are."""
    marks = (".lora_A.", ".lora_B.", ".lora_magnitude_vector.")
    return sum(any(mark in name for mark in marks) for name, _ in networks.named_parameters())


@pytest.mark.parametrize(("family", "kind", "layout"), [
    ("sd1", "lora", "kohya"), ("sd1", "conv", "kohya"), ("sd1", "conv", "diffusers"), ("sd1", "dora", "diffusers"),
    ("sd2", "conv", "kohya"), ("sdxl", "conv", "kohya"), ("sdxl", "dora", "diffusers"),
])  # fmt: skip
def test_diffusers_loads_every_key_and_predicts_the_same(family, kind, layout, tmp_path):
    lora = {**KINDS[kind], "text_encoder": TEXT, "formats": [layout]}
    model, _, _, files = exported(family, tmp_path, train=ALL[family], lora=lora)
    networks = toy_networks(family)

    pipeline(networks).load_lora_weights(str(tmp_path), weight_name=FILES[layout])

    in_file = sum(not key.endswith(".alpha") for key in load_file(files[0].path))
    assert num_loaded(networks) == in_file == num_loaded(model)
    torch.testing.assert_close(predict(networks), predict(model), rtol=0, atol=1e-5)
    assert not torch.allclose(predict(toy_networks(family)), predict(model), atol=1e-3)


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr", "conv"])
def test_kohyas_layout_comes_back_bit_for_bit_with_the_true_alpha(kind, tmp_path):
    lora = {**KINDS[kind], "text_encoder": TEXT}
    model, adapters, _, files = exported("sdxl", tmp_path, train=ALL["sdxl"], lora=lora)

    found = read_adapters(files[0].path, family="sdxl", layers=adapters.adaptable_layers())

    own = adapters.adapters(model.state_dict())
    assert found.keys() == own.keys() == {"unet", "text_encoder", "text_encoder_2"}
    for part, layers in own.items():
        assert found[part].keys() == layers.keys()
        for name, adapter in layers.items():
            assert (found[part][name].kind, found[part][name].alpha) == (adapter.kind, adapter.alpha)
            assert all(torch.equal(found[part][name].tensors[one], value) for one, value in adapter.tensors.items())


def test_names_that_other_trainers_give_are_read_too(tmp_path):
    from safetensors.torch import save_file

    model, adapters, _, files = exported("sd1", tmp_path, train=ALL["sd1"], lora={"rank": 2, "text_encoder": TEXT})
    tensors = {key.replace("lora_te_", "lora_te1_"): tensor for key, tensor in load_file(files[0].path).items()}
    save_file(tensors, tmp_path / "other.safetensors")
    for part, own in adapters.adapters(model.state_dict()).items():
        write_peft(tmp_path / "peft" / part, own, dtype=torch.float32, metadata={})

    layers = adapters.adaptable_layers()
    read = [
        read_adapters(path, family="sd1", layers=layers)
        for path in (files[0].path, tmp_path / "other.safetensors", tmp_path / "peft")
    ]

    for part, own in adapters.adapters(model.state_dict()).items():
        for name, adapter in own.items():
            assert all(
                torch.equal(found[part][name].tensors[one], value) and found[part][name].alpha == adapter.alpha
                for found in read
                for one, value in adapter.tensors.items()
            )


# --- names of the real architectures ---

REAL = {
    "sd1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20],
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "use_linear_projection": True,
        "transformer_layers_per_block": [1, 2, 10], "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip
SD1_PLACES = {
    **{f"down_blocks_{level}_attentions_{number}": 1 for level in range(3) for number in range(2)},
    "mid_block_attentions_0": 1,
    **{f"up_blocks_{level}_attentions_{number}": 1 for level in (1, 2, 3) for number in range(3)},
}
SDXL_PLACES = {
    **{f"input_blocks_{number}_1": depth for number, depth in ((4, 2), (5, 2), (7, 10), (8, 10))},
    "middle_block_1": 10,
    **{f"output_blocks_{number}_1": depth for number, depth in enumerate((10, 10, 10, 2, 2, 2))},
}


def transformer_names(places):
    """The naming rule of kohya's networks.lora: {place: number of transformer blocks}."""
    inside = [f"attn{attn}_to_{letter}" for attn in (1, 2) for letter in ("q", "k", "v", "out_0")]
    return {
        f"lora_unet_{place}_{name}"
        for place, depth in places.items()
        for name in [
            "proj_in", "proj_out",
            *(f"transformer_blocks_{block}_{one}" for block in range(depth)
              for one in [*inside, "ff_net_0_proj", "ff_net_2"]),
        ]
    }  # fmt: skip


def names_of(family, targets):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**REAL[family])
    names = kohya_names("unet", adaptable(unet), family)
    layers = chosen(unet, expanded(targets, "unet"), rank=4, alpha=1.0)[""]
    return {f"lora_unet_{names[layer.name].replace('.', '_')}" for layer in layers}


@pytest.mark.parametrize(("family", "places", "count"), [("sd1", SD1_PLACES, 192), ("sdxl", SDXL_PLACES, 722)])
def test_keys_of_the_real_unets_are_those_of_the_naming_rule(family, places, count):
    found = names_of(family, ["kohya"])

    assert found == names_of(family, ["default"]) == transformer_names(places) and len(found) == count


def test_convolutions_of_the_real_sdxl_have_original_names():
    found = names_of("sdxl", ["kohya_conv"]) - transformer_names(SDXL_PLACES)

    resnets = [
        *(f"input_blocks_{number}_0" for number in (1, 2, 4, 5, 7, 8)), "middle_block_0", "middle_block_2",
        *(f"output_blocks_{number}_0" for number in range(9)),
    ]  # fmt: skip
    shortcuts = ["input_blocks_4_0", "input_blocks_7_0", *(f"output_blocks_{number}_0" for number in range(9))]
    expected = {f"{one}_{end}" for one in resnets for end in ("in_layers_2", "emb_layers_1", "out_layers_3")}
    expected |= {f"{one}_skip_connection" for one in shortcuts}
    expected |= {"input_blocks_3_0_op", "input_blocks_6_0_op", "output_blocks_2_2_conv", "output_blocks_5_2_conv"}
    assert found == {f"lora_unet_{one}" for one in expected}
    assert len(names_of("sdxl", ["kohya_conv"])) == 788 and len(names_of("sd1", ["kohya_conv"])) == 278


def test_keys_of_the_text_models_have_the_prefix_of_their_family(tmp_path):
    lora = {"rank": 2, "text_encoder": TEXT}
    one = load_file(exported("sd1", tmp_path / "1", train=ALL["sd1"], lora=lora)[3][0].path)
    two = load_file(exported("sdxl", tmp_path / "2", train=ALL["sdxl"], lora=lora)[3][0].path)

    def stems(tensors, prefix):
        return {key.split(".")[0] for key in tensors if key.startswith(prefix)}

    parts = ["self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj", "self_attn_out_proj", "mlp_fc1", "mlp_fc2"]
    named = [[f"text_model_encoder_layers_{layer}_{part}" for part in parts] for layer in range(3)]
    assert stems(one, "lora_te") == {f"lora_te_{name}" for layer in named for name in layer}
    assert stems(two, "lora_te1_") == {f"lora_te1_{name}" for layer in named[:2] for name in layer}
    assert stems(two, "lora_te2_") == {f"lora_te2_{name}" for layer in named for name in layer}
    with torch.device("meta"):
        text = CLIPTextModel(CLIPTextConfig(num_hidden_layers=12))
    assert len(chosen(text, expanded(["kohya"], "text_encoder"), rank=4, alpha=1.0)[""]) == 72


# --- what files tell ---


@pytest.mark.parametrize(
    ("family", "predicts_v", "base", "architecture"),
    [
        ("sd1", False, "sd_v1", "stable-diffusion-v1/lora"),
        ("sd2", True, "sd_v2_v", "stable-diffusion-v2-768-v/lora"),
        ("sdxl", False, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    ],
)
def test_headers_name_the_base_and_the_true_alpha(family, predicts_v, base, architecture, tmp_path):
    header = {"modelspec.title": "toy"}
    exported(family, tmp_path, lora={"rank": 4, "alpha": 2.5}, predicts_v=predicts_v, header=header)

    with safe_open(tmp_path / KOHYA_FILE, framework="pt") as file:
        found, alphas = file.metadata(), {float(file.get_tensor(key)) for key in file.keys() if "alpha" in key}  # noqa: SIM118

    expected = {
        "ss_base_model_version": base, "ss_v2": str(family == "sd2"), "ss_network_dim": "4", "ss_network_alpha": "2.5",
        "ss_network_module": "networks.lora", "modelspec.architecture": architecture, "modelspec.title": "toy",
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected and alphas == {2.5}


def test_the_privacy_switch_leaves_training_facts_out(tmp_path):
    exported("sd1", tmp_path, lora={"rank": 2}, save={"training_facts": False})

    with safe_open(tmp_path / KOHYA_FILE, framework="pt") as file:
        assert not [key for key in file.metadata() if key.startswith("ss_")]
        assert file.metadata()["modelspec.architecture"] == "stable-diffusion-v1/lora"


def test_the_same_weights_give_the_same_bytes_and_casts_are_counted(tmp_path):
    first = exported("sd1", tmp_path / "a", lora={"rank": 2}, dtype=torch.float16)[3]
    second = exported("sd1", tmp_path / "b", lora={"rank": 2}, dtype=torch.float16)[3]

    tensors = load_file(first[0].path)
    assert first[0].path.read_bytes() == second[0].path.read_bytes() and first[0].num_overflowed == 0
    assert {tensor.dtype for key, tensor in tensors.items() if "alpha" not in key} == {torch.float16}


# --- tokens ---


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_diffusers_reads_tokens_as_textual_inversions(family, tmp_path):
    tokens = {"train": [{"token": "[cat]", "initialise": "^dog</w>"}, {"existing": "^hat</w>"}], "only": True}
    model, adapters, tokenizer, files = exported(family, tmp_path, tokens=tokens)
    caption = "a [cat], and a [cat] with a dog"
    networks = toy_networks(family)
    pipe = pipeline(networks)

    path = tmp_path / "tokens" / "cat.safetensors"
    own = load_file(path)
    if family == "sdxl":
        for key, text, own_tokenizer in (("clip_l", pipe.text_encoder, pipe.tokenizer),
                                         ("clip_g", pipe.text_encoder_2, pipe.tokenizer_2)):  # fmt: skip
            pipe.load_textual_inversion(own[key], token="[cat]", text_encoder=text, tokenizer=own_tokenizer)
    else:
        pipe.load_textual_inversion(str(path), token="[cat]")

    assert own.keys() == ({"clip_l", "clip_g"} if family == "sdxl" else {"emb_params"})
    assert {file.path.name for file in files} == {"cat.safetensors", "hat.safetensors"}
    torch.testing.assert_close(
        predict(networks, pipe.tokenizer, caption), predict(model, tokenizer, caption), rtol=0, atol=1e-5
    )
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["modelspec.architecture"].endswith("/textual-inversion")
    assert adapters.tokens.num_new == 1
