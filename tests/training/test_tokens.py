"""Trained tokens: which they are, that nothing else of the table changes, and their files."""

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, safe_open

from scripts.demo_models.stage_c import make_stage_c_models
from tests.training.lora.models import adapted, predict, shake
from tests.training.toy import toy_config
from training.config.lora import TrainedTokenConfig
from training.optim.from_config import optimizer_from_config
from training.stage_c.adapter_export import export_adapters
from training.stage_c.text import BOS_ID, EOS_ID, load_tokenizer
from training.stage_c.text_files import load_text_model
from training.tokens.choose import choose_tokens

NEW = {"token": "[fernando]", "initialise": "^(dog|cat)</w>$"}
OLD = {"existing": "^girl</w>$"}
EMBEDDING = "text.text_model.text_model.embeddings.token_embedding"


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return make_stage_c_models(tmp_path_factory.mktemp("models"), seed=0)


def table_of(paths):
    return load_text_model(paths["text_encoder"]).get_input_embeddings().weight.detach()


def test_new_tokens_start_as_a_mean_and_existing_ones_as_they_are(paths):
    tokenizer, table = load_tokenizer("builtin"), table_of(paths)
    vocabulary = tokenizer.get_vocab()

    chosen = choose_tokens(tokenizer, table, [TrainedTokenConfig(**one) for one in (NEW, OLD, {"token": "<empty>"})])

    assert chosen.names == ("girl</w>", "[fernando]", "<empty>")
    assert chosen.ids == (vocabulary["girl</w>"], 49408, 49409) and chosen.num_new == 2
    mean = (table[vocabulary["dog</w>"]] + table[vocabulary["cat</w>"]]) / 2
    torch.testing.assert_close(chosen.initial, torch.stack([table[vocabulary["girl</w>"]], mean, torch.zeros(64)]))
    assert tokenizer("a [fernando], dog", add_special_tokens=False)["input_ids"][1] == 49408


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"existing": "^nosuchword</w>"}, "tokens.train.0.existing: '^nosuchword</w>' finds none of 49,408"),
        ({"token": "[a]", "initialise": "^nosuchword$"}, "tokens.train.0.initialise"),
        ({"token": "<|endoftext|>"}, "is in the tokenizer"),
    ],
)
def test_tokens_that_cannot_be_are_refused(paths, values, problem):
    with pytest.raises(ValueError, match=problem.replace("^", r"\^").replace("|", r"\|")):
        choose_tokens(load_tokenizer("builtin"), table_of(paths), [TrainedTokenConfig(**values)])


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"token": "plain"}, r"must be \[name\] or <name>"),
        ({"token": "[Name]"}, "lower case"),
        ({}, "give either token"),
        ({"existing": "(", "token": None}, "not a regular expression"),
        ({"existing": "a", "initialise": "b"}, "initialise is for a new token"),
    ],
)
def test_settings_that_make_no_token_are_refused(values, problem):
    with pytest.raises(ValidationError, match=problem):
        toy_config(tokens={"train": [values]})


def test_only_the_trained_rows_learn_whatever_decays(paths):
    config, model, adapters, conditioning = adapted(
        paths, tokens={"train": [NEW, OLD], "only": True, "learning_rate": 0.25}, optimizer={"weight_decay": 0.5}
    )
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = optimizer_from_config(
        config, model, adapters.parts, learning_rates={"network": 1.0, **adapters.learning_rates()}
    )

    predict(model, conditioning, "a [fernando] in the rain", "a dog").square().mean().backward()
    optimizer.step()

    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    change = model.get_parameter(f"{EMBEDDING}.change")
    assert changed == {f"{EMBEDDING}.change"}
    assert [bool(row.any()) for row in change] == [False, True]  # no caption has the other
    assert [group["peak_rate"] for group in optimizer.param_groups] == [0.25]
    assert set(model.state_dict()) == {f"{EMBEDDING}.change", f"{EMBEDDING}.initial"}


def test_a_new_token_changes_captions_with_it_and_no_others(paths):
    _, model, _, conditioning = adapted(paths, tokens={"train": [NEW], "only": True})
    captions = ("a [fernando]", "a dog")
    before = predict(model, conditioning, *captions).detach()

    shake(model)
    after = predict(model, conditioning, *captions).detach()

    assert not torch.allclose(after[0], before[0], atol=1e-4)
    assert torch.equal(after[1], before[1])


def test_text_is_pooled_at_the_end_token_beside_a_new_one(paths):
    _, _, _, conditioning = adapted(paths, tokens={"train": [{"token": "[dog]", "initialise": "^dog</w>$"}]})
    windows = conditioning.tokens(["a [dog] runs", "a dog runs"]).windows

    text, pooled = conditioning.text(windows, True)

    assert windows[0, 0, :5].tolist() == [BOS_ID, 320, 49408, windows[1, 0, 3], EOS_ID]
    torch.testing.assert_close(text[0], text[1])
    torch.testing.assert_close(pooled[0], pooled[1])


@pytest.mark.parametrize(
    "settings", [{"lora": {"base_weights": "fp32"}}, {}, {"stage_c": {"train_text_encoder": True}}]
)
def test_tokens_are_trained_with_adapters_and_with_whole_networks(paths, settings):
    trains_text = "stage_c" in settings
    _, model, adapters, conditioning = adapted(paths, **settings, tokens={"train": [NEW, OLD]})

    predict(model, conditioning, "a [fernando], a girl").square().mean().backward()

    parts = adapters.parts()
    assert set(parts) == {"network", "tokens"} | ({"text_encoder"} if trains_text else set())
    assert all(parameter.grad is not None for members in parts.values() for parameter in members)
    table = model.get_parameter(f"{EMBEDDING}.weight")
    assert (table.grad is not None) == trains_text
    if table.grad is not None:
        assert not table.grad[conditioning.tokenizer.get_vocab()["girl</w>"]].any()


def test_files_hold_whole_embeddings_and_the_official_layout_their_changes(paths, tmp_path):
    tokens = {"train": [NEW, OLD]}
    config, model, adapters, conditioning = adapted(
        paths, lora={"base_weights": "fp32", "formats": ["official"]}, tokens=tokens
    )
    shake(model)
    arguments = {"config": config, "tokenizer": conditioning.tokenizer, "dtype": torch.float32, "header": {}}

    files = export_adapters(adapters, tmp_path, weights=model.state_dict(), **arguments)

    assert [file.path.name for file in files] == [
        "girl.safetensors",
        "fernando.safetensors",
        "lora_official.safetensors",
    ]
    state = model.state_dict()
    rows = state[f"{EMBEDDING}.initial"] + state[f"{EMBEDDING}.change"]
    for number, name in enumerate(("girl", "fernando")):
        assert torch.equal(load_file(tmp_path / "tokens" / f"{name}.safetensors")["clip_g"], rows[number : number + 1])
    with safe_open(tmp_path / "tokens" / "fernando.safetensors", framework="pt") as file:
        assert file.metadata()["modelspec.architecture"] == "stable-cascade/textual-inversion"
        assert file.metadata()["chunkline.token"] == "[fernando]"
    official = load_file(tmp_path / "lora_official.safetensors")
    assert official["embeddings.indices"].tolist() == list(adapters.tokens.ids)
    assert torch.equal(official["embeddings.embeddings"], state[f"{EMBEDDING}.change"])
    again = load_tokenizer(tmp_path / "tokenizer")
    assert again("a [fernando]", add_special_tokens=False)["input_ids"][-1] == 49408

    second = adapted(
        paths, lora={"base_weights": "fp32", "init": str(tmp_path / "lora_official.safetensors")}, tokens=tokens
    )[1].state_dict()
    assert all(torch.equal(second[name], value) for name, value in state.items())


def test_whole_text_weights_hold_existing_tokens_and_no_new_ones(paths):
    _, model, adapters, conditioning = adapted(paths, tokens={"train": [NEW, OLD], "only": True})
    shake(model)
    number, table = conditioning.tokenizer.get_vocab()["girl</w>"], table_of(paths)

    merged = adapters.merged_text()["text_model.embeddings.token_embedding.weight"]

    assert merged.shape == table.shape
    assert [row for row in range(len(table)) if not torch.equal(merged[row], table[row])] == [number]
    assert torch.equal(merged[number], adapters.token_rows(model.state_dict())[0])
    assert adapters.changes_text and not adapters.exports_networks
