"""Adapters and trained tokens of Stable Diffusion: what they train, what states hold, merging."""

import pytest
import torch

from tests.training.dreambooth.toy_adapters import KINDS, adapted, predict, shake, toy_networks
from training.dreambooth.adapters.files import write_adapters
from training.lora.adapter import AdapterError
from training.lora.frozen_base import frozen_base

TEXTS = {"sd1": ("text_encoder",), "sd2": ("text_encoder",), "sdxl": ("text_encoder", "text_encoder_2")}
NEW = {"token": "[cat]", "initialise": "^dog</w>"}
OLD = {"existing": "^hat</w>"}


def merged(family, adapters, weights=None):
    """Return plain networks with what was trained in them."""
    networks = toy_networks(family)
    networks.unet.load_state_dict(adapters.merged_unet(weights))
    for index, text in enumerate(networks.text.texts):
        text.load_state_dict(adapters.merged_text(index, weights))
    return networks


@pytest.mark.parametrize(("family", "kind"), [*(("sd1", kind) for kind in KINDS), ("sd2", "lora"), ("sdxl", "conv")])
def test_merged_weights_predict_what_the_network_with_its_adapters_does(family, kind):
    _, model, adapters, _ = adapted(family, train=("unet", *TEXTS[family]), lora={**KINDS[kind], "text_encoder": {}})
    start = predict(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shake(model)

    ours = predict(model)

    torch.testing.assert_close(start, predict(toy_networks(family)), rtol=0, atol=1e-5)
    assert not torch.allclose(ours, start, atol=1e-3)
    torch.testing.assert_close(predict(merged(family, adapters)), ours, rtol=0, atol=1e-5)
    torch.testing.assert_close(predict(merged(family, adapters, weights)), start, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_only_adapters_are_trained_and_in_states(family):
    _, model, adapters, _ = adapted(family, train=("unet", "text_encoder"), lora={**KINDS["conv"], "text_encoder": {}})

    state, parts = model.state_dict(), adapters.parts()

    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(state) == trained and {name for name, _ in model.named_parameters()} - trained == frozen_base(model)
    assert parts.keys() == {"unet", "conv", "text_encoder"} and adapters.learning_rates() == {"conv": 0.5}
    assert sum(len(parameters) for parameters in parts.values()) == len(trained)
    assert adapters.layers["unet"]["conv"][0].rank == 3 and adapters.layers["unet"][""][0].rank == 2
    assert adapters.digests.keys() == {"dreambooth.unet", *(f"dreambooth.{one}" for one in TEXTS[family])}
    assert not adapters.exports_networks and adapters.changes_text
    model.load_state_dict(state, strict=True)


def test_targets_choose_attention_only_or_patterns_of_layers():
    attention = adapted("sd1", lora={"targets": ["attention"]})[2]
    own = adapted("sd1", lora={"targets": ["mid_block.*.ff.net.*"]})[2]

    assert {one.name.rpartition("attn")[2][2:] for one in attention.layers["unet"][""]} == {
        "to_q", "to_k", "to_v", "to_out.0"
    }  # fmt: skip
    assert [one.name for one in own.layers["unet"][""]] == [
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.2",
    ]


def test_a_stage_keeps_the_adapters_of_another_stage_as_they_are():
    stages = [{"name": "both", "epochs": 1, "train": ["unet", "text_encoder"]}, {"name": "unet", "epochs": 1}]
    lora = {"rank": 2, "text_encoder": {"rank": 2}}
    _, first, _, _ = adapted("sd1", train=("unet", "text_encoder"), stages=stages, lora=lora)
    shake(first)

    _, second, adapters, _ = adapted("sd1", train=("unet",), stages=stages, lora=lora)
    second.load_state_dict(first.state_dict(), strict=True)

    assert adapters.parts().keys() == {"unet"} and "text_encoder" in adapters.adapters(second.state_dict())
    torch.testing.assert_close(predict(second), predict(first), rtol=0, atol=0)


def test_layers_that_clip_skip_cuts_get_no_adapter():
    lora = {"rank": 2, "text_encoder": {"rank": 2}}
    train = ("text_encoder", "text_encoder_2")

    skipped = adapted("sd1", train=("text_encoder",), clip_skip=2, lora=lora)[2]
    two = adapted("sdxl", train=train, lora=lora)[2]

    layers = {part: {one.name.split("layers.")[1][0] for one in blocks[""]} for part, blocks in two.layers.items()}
    assert {one.name.split("layers.")[1][0] for one in skipped.layers["text_encoder"][""]} == {"0", "1"}
    assert layers == {"text_encoder": {"0", "1"}, "text_encoder_2": {"0", "1", "2"}}
    assert "unet" not in two.layers


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_tokens_are_trained_in_every_text_model_and_nothing_else_is(family):
    _, model, adapters, tokenizer = adapted(family, tokens={"train": [NEW, OLD], "only": True})
    before = predict(model, tokenizer)
    shake(model, size=0.5)

    rows, parts = adapters.token_rows(model.state_dict()), adapters.parts()

    assert parts.keys() == {"tokens"} and len(parts["tokens"]) == len(TEXTS[family])
    assert rows.keys() == set(TEXTS[family]) and all(one.shape == (2, 64) for one in rows.values())
    assert not torch.allclose(predict(model, tokenizer), before, atol=1e-3)
    assert tokenizer.convert_tokens_to_ids("[cat]") == adapters.tokens.ids[-1]
    plain, hat = toy_networks(family), adapters.tokens.ids[0]
    for index, text in enumerate(plain.text.texts):
        table = text.get_input_embeddings().weight
        theirs = adapters.merged_text(index)[f"{'text_model.' * index}embeddings.token_embedding.weight"]
        changed = (theirs != table).any(dim=1).nonzero().flatten().tolist()
        assert changed == [hat]
    assert adapters.changes_text and not adapters.exports_networks


def test_new_tokens_start_at_the_mean_of_what_is_named_in_each_table():
    _, model, adapters, _ = adapted("sdxl", tokens={"train": [{**NEW, "initialise": "^(dog|hat)</w>"}], "only": True})

    rows = adapters.token_rows(model.state_dict())

    tokenizer = adapted("sd1", lora={})[3]
    ids = tokenizer.convert_tokens_to_ids(["dog</w>", "hat</w>"])
    for part, text in zip(rows, toy_networks("sdxl").text.texts, strict=True):
        expected = text.get_input_embeddings().weight[ids].mean(dim=0)
        torch.testing.assert_close(rows[part][0], expected.detach())


def test_the_unet_is_trained_whole_beside_tokens():
    _, model, adapters, _ = adapted("sd1", tokens={"train": [OLD]})

    parts = adapters.parts()

    assert parts.keys() == {"unet", "tokens"} and len(parts["unet"]) == len(list(model.unet.parameters()))
    assert adapters.exports_networks and adapters.digests.keys() == {"dreambooth.text_encoder"}


@pytest.mark.parametrize(
    ("kind", "layout"), [*((kind, "kohya") for kind in KINDS), ("dora", "diffusers"), ("conv", "diffusers")]
)
def test_training_starts_from_a_file(kind, layout, tmp_path):
    lora = {**KINDS[kind], "text_encoder": {"rank": 2, "alpha": 3.0}, "formats": [layout]}
    _, model, adapters, _ = adapted("sd1", train=("unet", "text_encoder"), lora=lora)
    shake(model)
    reports = write_adapters(
        tmp_path, adapters.adapters(model.state_dict()), family="sd1", formats=[layout], dtype=torch.float32,
        unet_layers=adapters.adaptable_layers()["unet"], metadata={},
    )  # fmt: skip

    _, again, _, _ = adapted("sd1", train=("unet", "text_encoder"), lora={**lora, "init": str(reports[0].path)})

    exactly = {"rtol": 0, "atol": 0} if layout == "kohya" else {"rtol": 0, "atol": 1e-6}
    found = again.state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found[name], tensor, **exactly)


def test_starting_from_a_file_of_more_parts_than_are_trained_is_refused(tmp_path):
    lora = {"rank": 2, "text_encoder": {"rank": 2}}
    _, model, adapters, _ = adapted("sd1", train=("unet", "text_encoder"), lora=lora)
    path = write_adapters(
        tmp_path, adapters.adapters(model.state_dict()), family="sd1", formats=["kohya"], dtype=torch.float32,
        unet_layers=adapters.adaptable_layers()["unet"], metadata={},
    )[0].path  # fmt: skip

    with pytest.raises(AdapterError, match=r"adapters of the text_encoder, which dreambooth.train does not name"):
        adapted("sd1", lora={"rank": 2, "init": str(path)})
    with pytest.raises(AdapterError, match=r"lora_unet_.* belong to no layer of this model"):
        adapted("sdxl", lora={"rank": 2, "init": str(path)})
    with pytest.raises(AdapterError, match=r"set lora\.rank to it"):
        adapted("sd1", train=("unet", "text_encoder"), lora={**lora, "rank": 3, "init": str(path)})


@pytest.mark.parametrize(
    ("lora", "problem"),
    [
        (
            {"formats": ["official"]},
            "'official' is not for the recipe dreambooth; choose from kohya, diffusers, merged",
        ),
        ({"formats": ["diffusers"], "kind": "loha"}, '"diffusers" holds LoRA and DoRA only, kind is "loha"'),
        ({"text_encoder": {}}, "dreambooth.train names no text encoder"),
        ({"base_weights": "fp16"}, 'base_weights "fp16" needs precision.autocast'),
    ],
)
def test_settings_that_do_not_go_together_are_refused(lora, problem):
    with pytest.raises(ValueError, match=problem):
        adapted("sd1", lora=lora, precision={"autocast": "no"})


def test_settings_of_parts_that_are_not_trained_are_refused():
    with pytest.raises(ValueError, match=r"give the table \[lora.text_encoder\], too"):
        adapted("sd1", train=("unet", "text_encoder"), lora={})
    with pytest.raises(ValueError, match=r"lora.blocks: they are of the UNet"):
        adapted("sd1", train=("text_encoder",), lora={**KINDS["conv"], "text_encoder": {}})


@pytest.mark.parametrize("base_weights", ["fp16", "bf16"])
def test_a_base_in_16_bits_predicts_under_autocast_and_loses_little(base_weights):
    lora = {"rank": 2, "base_weights": base_weights, "text_encoder": {}}
    _, model, adapters, _ = adapted("sd1", train=("unet", "text_encoder"), lora=lora)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        predicted = predict(model)

    torch.testing.assert_close(predicted.float(), predict(toy_networks("sd1")), rtol=0, atol=0.05)
    formats = {(one.dtype, one.ndim < 2) for one in model.parameters() if not one.requires_grad}
    half = torch.float16 if base_weights == "fp16" else torch.bfloat16
    assert formats == {(half, False), (torch.float32, True)}
    assert all(one.dtype == torch.float32 for part in adapters.parts().values() for one in part)
