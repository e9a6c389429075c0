"""Adapters on stage C: what they train, what states hold, merging, and their files in three layouts."""

import json

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, safe_open
from torch import nn

from tests.training.lora.models import adapted, predict, shake
from tests.training.toy import toy_config
from training.lora.adapter import AdapterError
from training.lora.frozen_base import frozen_base
from training.lora.layers import adaptable_names
from training.lora.metadata import network_metadata
from training.stage_c.adaptable import layer_shapes
from training.stage_c.adapter_files import read_adapters, write_adapters
from training.stage_c.adapter_names import NETWORK, TEXT, apart, official_order, together
from training.stage_c.formats import load_stage_c, network_from_state_dict
from training.stage_c.merge_files import merge_files
from training.stage_c.model import StageCModel

FP32 = {"base_weights": "fp32"}
KINDS = {
    "official": {**FP32},
    "kohya": {**FP32, "targets": ["kohya"], "text_encoder": {"rank": 2}},
    "dora": {**FP32, "kind": "dora", "targets": ["kohya"]},
    "loha": {**FP32, "kind": "loha", "targets": ["*.attn.to_?", "*.channelwise.*"]},
    "lokr": {**FP32, "kind": "lokr", "targets": ["kohya"], "rank": 1},
    "whole lokr": {**FP32, "kind": "lokr", "targets": ["*.attn.to_q"], "rank": 64, "alpha": 8.0},
    "blocks": {**FP32, "blocks": [{"name": "deep", "targets": ["*_blocks.1.*"], "rank": 8, "learning_rate": 0.5}]},
}


@pytest.fixture(params=KINDS, scope="module")
def tuned(request, paths):
    """(config, model, adapters, conditioning) with adapters that are moved from where they start."""
    made = adapted(paths, lora=KINDS[request.param])
    shake(made[1])
    return made


def exported(tuned, folder, *formats, dtype=torch.float32):
    config, model, adapters, _ = tuned
    return write_adapters(
        folder, adapters.adapters(model.state_dict()), formats=formats, order=adapters.module_order(), dtype=dtype,
        metadata=network_metadata(config, config.lora, base="stable_cascade"), tokens=([], torch.zeros(0, 64)),
    )  # fmt: skip


def read_again(tuned, path):
    _, model, adapters, _ = tuned
    text = [] if model.text is None else adaptable_names(model.text.text_model)
    order = official_order(adapters.module_order())
    return read_adapters(path, shapes=layer_shapes(model.network), order=order, text_layers=text)


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, adapter in theirs.items():
        assert (ours[name].kind, ours[name].alpha) == (adapter.kind, adapter.alpha), name
        assert ours[name].tensors.keys() == adapter.tensors.keys()
        assert all(torch.equal(ours[name].tensors[one], tensor) for one, tensor in adapter.tensors.items()), name


def test_a_network_with_new_adapters_predicts_what_it_did(paths):
    for lora in KINDS.values():
        config, model, _, conditioning = adapted(paths, lora=lora)

        plain = StageCModel(load_stage_c(config.stage_c.network), None)
        plain.network.set_dropout(0.0)

        prediction = predict(model, conditioning, "a cat", "a dog")
        torch.testing.assert_close(prediction, predict(plain, conditioning, "a cat", "a dog"), rtol=1e-5, atol=1e-5)


def test_merged_weights_predict_what_the_network_with_its_adapters_does(tuned):
    _, model, adapters, conditioning = tuned
    merged = StageCModel(network_from_state_dict(adapters.merged_network(), config=model.network.config), model.text)

    before = StageCModel(load_stage_c(tuned[0].stage_c.network), model.text)
    before.network.set_dropout(0.0)
    merged.network.set_dropout(0.0)

    theirs = predict(model, conditioning, "a cat", "a dog")
    torch.testing.assert_close(predict(merged, conditioning, "a cat", "a dog"), theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(predict(before, conditioning, "a cat", "a dog"), theirs, atol=1e-4)


def test_only_adapters_are_trained_and_in_states(tuned):
    _, model, adapters, _ = tuned
    state = model.state_dict()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    assert set(state) == trained
    assert sum(len(parameters) for parameters in adapters.parts().values()) == len(trained)
    assert {name for name, _ in model.named_parameters()} - trained == frozen_base(model)
    model.load_state_dict(state, strict=True)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(dict(list(state.items())[1:]), strict=True)


def test_kohyas_layout_comes_back_bit_for_bit_with_the_true_alpha(tuned, tmp_path):
    config, model, adapters, _ = tuned
    own = {component: apart(one) for component, one in adapters.adapters(model.state_dict()).items()}

    exported(tuned, tmp_path, "kohya")
    found = read_again(tuned, tmp_path / "lora.safetensors").parts

    assert found.keys() == own.keys()
    if config.lora.rank != 64:  # two whole factors: the scale is put into one of them
        for component in own:
            assert_same(found[component], own[component])
    shapes = layer_shapes(model.network)
    for name, adapter in own[NETWORK].items():
        assert torch.allclose(found[NETWORK][name].change(shapes[name]), adapter.change(shapes[name]), atol=1e-7)
    with safe_open(tmp_path / "lora.safetensors", framework="pt") as file:
        alphas = {float(file.get_tensor(key)) for key in file.keys() if key.endswith(".alpha")}  # noqa: SIM118
        assert file.metadata()["ss_base_model_version"] == "stable_cascade"
    assert config.lora.alpha in alphas or config.lora.rank == 64


def test_pefts_layout_comes_back_bit_for_bit(tuned, tmp_path):
    _, model, adapters, _ = tuned

    exported(tuned, tmp_path, "peft")
    found = read_again(tuned, tmp_path / "peft").parts

    for component, one in adapters.adapters(model.state_dict()).items():
        assert_same(found[component], apart(one))


def test_peft_puts_the_folder_on_diffusers_network_with_the_same_prediction(tuned, tmp_path):
    diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    from training.stage_c.layouts import from_original
    from training.stage_c.network_config import config_to_diffusers

    config, model, _, conditioning = tuned
    exported(tuned, tmp_path, "peft")
    kwargs = {key: v for key, v in config_to_diffusers(model.network.config).items() if key != "_class_name"}
    theirs = diffusers.models.StableCascadeUNet(**kwargs).eval()
    theirs.load_state_dict(from_original(load_stage_c(config.stage_c.network).state_dict(), "diffusers"))
    adapted_unet = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft")
    x, r = torch.randn(2, 16, 8, 8), torch.rand(2)
    text, pooled = conditioning.text(conditioning.tokens(["a", "b"]).windows, True)

    other = adapted_unet(
        x,
        r,
        clip_text_pooled=pooled,
        clip_text=text,
        clip_img=torch.zeros(2, 1, model.network.config.c_clip_img),
        return_dict=False,
    )

    torch.testing.assert_close(model.network(x, r, text, pooled), other[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora", ["official", "blocks"])
def test_the_official_layout_comes_back_and_does_what_its_code_does(paths, tmp_path, lora):
    tuned = adapted(paths, lora={**KINDS[lora], "alpha": 2.0})
    shake(tuned[1])
    _, model, adapters, conditioning = tuned

    exported(tuned, tmp_path, "official")
    file = load_file(tmp_path / "lora_official.safetensors")
    found = read_again(tuned, tmp_path / "lora_official.safetensors").parts[NETWORK]

    own = adapters.adapters(model.state_dict())[NETWORK]
    for name, adapter in own.items():
        shape = layer_shapes(model.network)[name]
        torch.testing.assert_close(found[name].change(shape), adapter.change(shape))
    # The official code: parametrizations numbered as it meets them, times 1 / rank.
    plain = load_stage_c(tuned[0].stage_c.network)
    plain.set_dropout(0.0)
    number = 0
    with torch.no_grad():
        for module in plain.modules():
            if hasattr(module, "in_proj_weight"):
                for weight in (module.out_proj.weight, module.in_proj_weight):
                    down, up = file[f"weights.{number}.lora_down"], file[f"weights.{number}.lora_up"]
                    weight += up @ down / len(down)
                    number += 1
    assert 2 * number + 2 == len(file)
    assert file["embeddings.embeddings"].shape == (0, 64) and file["embeddings.indices"].shape == (0,)
    expected = predict(StageCModel(plain, None), conditioning, "a cat")
    torch.testing.assert_close(predict(model, conditioning, "a cat"), expected, rtol=1e-4, atol=1e-5)


def test_a_nameless_official_file_is_read_by_its_order(paths, tmp_path):
    from safetensors.torch import save_file

    tuned = adapted(paths, lora=FP32)
    shake(tuned[1])
    exported(tuned, tmp_path, "official")
    save_file(load_file(tmp_path / "lora_official.safetensors"), tmp_path / "theirs.safetensors")

    order = official_order([layer.name for layer in tuned[2]._of(NETWORK)])
    shapes = layer_shapes(tuned[1].network)
    found = read_adapters(tmp_path / "theirs.safetensors", shapes=shapes, order=order, text_layers=[])

    assert_same(found.parts[NETWORK], tuned[2].adapters(tuned[1].state_dict())[NETWORK])
    with pytest.raises(AdapterError, match=r"8 layers without names, lora.targets names 6"):
        read_adapters(tmp_path / "theirs.safetensors", shapes=shapes, order=order[:-2], text_layers=[])


@pytest.mark.parametrize("formats", ["kohya", "official", "peft"])
def test_a_run_starts_from_a_file_and_a_wrong_one_is_refused(paths, tmp_path, formats):
    first = adapted(paths, lora=FP32)
    shake(first[1])
    exported(first, tmp_path, formats)
    name = {"kohya": "lora.safetensors", "official": "lora_official.safetensors", "peft": "peft"}[formats]

    second = adapted(paths, lora={**FP32, "init": str(tmp_path / name)})

    ours, theirs = second[1].state_dict(), first[1].state_dict()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    with pytest.raises(AdapterError, match=r"the file's rank is 4: set lora\.rank to it"):
        adapted(paths, lora={**FP32, "rank": 8, "init": str(tmp_path / name)})
    with pytest.raises(AdapterError, match="does not name"):
        adapted(paths, lora={**FP32, "targets": ["*.attn.in_proj"], "init": str(tmp_path / name)})


def test_another_alpha_keeps_the_change_of_the_file(paths, tmp_path):
    first = adapted(paths, lora=FP32)
    shake(first[1])
    exported(first, tmp_path, "kohya")

    second = adapted(paths, lora={**FP32, "alpha": 4.0, "init": str(tmp_path / "lora.safetensors")})

    ours, theirs = (one[2].merged_network() for one in (second, first))
    assert all(torch.allclose(ours[name], value, atol=1e-6) for name, value in theirs.items())


def test_merge_puts_a_file_into_weights_as_a_few_lines_of_arithmetic_do(paths, tmp_path):
    tuned = adapted(paths, lora={**KINDS["kohya"], "alpha": 2.0})
    shake(tuned[1])
    exported(tuned, tmp_path, "kohya")
    from training.config.saving import SaveConfig

    base, file = load_file(paths["stage_c"]), load_file(tmp_path / "lora.safetensors")
    merge_files(
        str(paths["stage_c"]), tmp_path / "lora.safetensors", tmp_path / "merged", scale=0.7,
        save=SaveConfig(export_dtype="fp32"), text_encoder=str(paths["text_encoder"]),
    )  # fmt: skip
    merged = load_file(tmp_path / "merged" / "stage_c.safetensors")

    for key, weight in base.items():
        stem = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
        expected = weight.float().clone()
        stems = [stem]
        if key.endswith("in_proj_weight"):
            stems = [stem.replace("in_proj_weight", f"to_{letter}") for letter in "qkv"]
        for part, own in zip(expected.chunk(len(stems)), stems, strict=True):
            if f"{own}.lora_up.weight" in file:
                up, down = file[f"{own}.lora_up.weight"].flatten(1), file[f"{own}.lora_down.weight"].flatten(1)
                part += (0.7 * float(file[f"{own}.alpha"]) / len(down) * (up @ down)).reshape(part.shape)
        torch.testing.assert_close(merged[key], expected, rtol=1e-5, atol=1e-6, msg=key)
    assert not torch.equal(
        merged["down_blocks.0.2.attention.attn.in_proj_weight"], base["down_blocks.0.2.attention.attn.in_proj_weight"]
    )
    text = load_file(tmp_path / "merged" / "text_model.safetensors")
    own = load_file(paths["text_encoder"] / "model.safetensors")
    changed = {key for key, value in own.items() if not torch.equal(value.float(), text[key])}
    assert len(changed) == 12 and all(".self_attn." in key or ".mlp." in key for key in changed)
    with pytest.raises(AdapterError, match="--text-encoder"):
        merge_files(
            str(paths["stage_c"]), tmp_path / "lora.safetensors", tmp_path / "m", scale=1.0, save=SaveConfig(),
            text_encoder=None,
        )  # fmt: skip


def test_adapters_learn_a_target_and_the_base_stays(paths):
    _, model, adapters, conditioning = adapted(paths, lora={**FP32, "targets": ["kohya"], "rank": 8, "alpha": 8.0})
    base = {name: value.detach().clone() for name, value in model.named_parameters() if not value.requires_grad}
    target = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(9))
    optimizer = torch.optim.AdamW([p for members in adapters.parts().values() for p in members], lr=0.02)

    losses = []
    for _ in range(40):
        loss = nn.functional.mse_loss(predict(model, conditioning, "a cat", "a dog"), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(value, base[name]) for name, value in model.named_parameters() if name in base)


def test_a_bf16_base_keeps_fp32_adapters_and_every_block_its_rate(paths):
    blocks = [{"name": "deep", "targets": ["*_blocks.1.*"], "rank": 8, "learning_rate": 0.5}]
    config, model, adapters, _ = adapted(paths, lora={"blocks": blocks})

    formats = {name: value.dtype for name, value in model.named_parameters()}
    assert {formats[name] for name in frozen_base(model)} == {torch.bfloat16}
    assert {formats[name] for name in model.state_dict()} == {torch.float32}
    assert adapters.learning_rates() == {"deep": 0.5}
    assert {name: len(members) for name, members in adapters.parts().items()} == {"network": 8, "deep": 8}
    assert config.lora.block_values(config.lora.blocks[0]) == (8, 2.0)
    assert adapters.digests.keys() == {"stage_c.network"}


def test_metadata_says_what_the_adapters_are(paths):
    config, *_ = adapted(paths, lora=KINDS["lokr"])

    said = network_metadata(config, config.lora, base="stable_cascade")

    assert said["ss_network_module"] == "lycoris.kohya" and json.loads(said["ss_network_args"]) == {"algo": "lokr"}
    assert (said["ss_network_dim"], said["ss_network_alpha"], said["ss_v2"]) == ("1", "1", "False")
    plain = network_metadata(toy_config(lora={}), toy_config(lora={}).lora, base="b")
    assert (plain["ss_network_module"], plain["ss_network_args"]) == ("networks.lora", "{}")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"lora": {"formats": ["official"], "kind": "dora", "targets": ["kohya"]}}, '"official" holds LoRA only'),
        ({"lora": {"formats": ["official"], "text_encoder": {}}}, "no place for text_encoder"),
        ({"lora": {"kind": "loha"}}, "needs q, k and v apart"),
        ({"lora": {"kind": "lokr", "targets": ["kohya"], "dropout": 0.1}}, "nothing to drop from"),
        ({"lora": {"text_encoder": {}}, "stage_c": {"train_text_encoder": True}}, "train adapters on it, or all of it"),
        ({"lora": {"formats": ["merged"]}, "parallel": {"strategy": "fsdp2"}}, "export --merged"),
        ({"lora": {"blocks": [{"name": "a", "targets": ["*"]}] * 2}}, "two are named 'a'"),
        (
            {
                "lora": {"blocks": [{"name": "a", "targets": ["*"], "learning_rate": 0.1}]},
                "optimizer": {"name": "prodigy", "learning_rate": 1.0},
            },
            "take those of tokens, lora.blocks and text_encoder_2 out",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, problem):
    with pytest.raises(ValidationError, match=problem):
        toy_config(**changes)


def test_together_needs_all_three(tuned):
    own = tuned[2].adapters(tuned[1].state_dict())
    half = {name: adapter for name, adapter in apart(own[NETWORK]).items() if not name.endswith(".to_v")}

    assert TEXT not in own or apart(own[TEXT]) == own[TEXT]
    if any(name.endswith(".to_q") for name in half):
        with pytest.raises(AdapterError, match="cannot be put together"):
            together(half)
