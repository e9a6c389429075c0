"""Token windows, states before the final norm, and text model files."""

import json

import pytest
import torch

from training.stage_c.text import (
    BOS_ID,
    EOS_ID,
    TextConditioner,
    load_tokenizer,
    real_token_mask,
    tokenize,
)
from training.stage_c.text_files import load_text_model, save_text_model
from training.weight_files import WeightsError, write_tensors

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("builtin")


@pytest.fixture(scope="module")
def text_model():
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=12,
        vocab_size=49_408,
        hidden_act="gelu",
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=EOS_ID,
    )
    model = transformers.CLIPTextModelWithProjection(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # a final norm that does something
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def test_the_built_in_vocabulary_gives_the_true_ids(tokenizer):
    windows, num_tokens = tokenize(tokenizer, ["A  photo of a cat", ""], max_tokens=75)

    assert windows.shape == (2, 1, 77) and windows.dtype == torch.int64
    assert windows[0, 0, :8].tolist() == [BOS_ID, 320, 1125, 539, 320, 2368, EOS_ID, EOS_ID]
    assert windows[1, 0].tolist() == [BOS_ID] + [EOS_ID] * 76
    assert num_tokens.tolist() == [5, 0]


@pytest.mark.parametrize("num_words", [3, 74, 75, 76, 149, 150, 151, 224, 225, 226, 400])
@pytest.mark.parametrize("max_tokens", [75, 150, 225])
def test_windows_are_begin_75_ids_last_id(tokenizer, num_words, max_tokens):
    words = " ".join(["cat", "dog", "bird"][index % 3] for index in range(num_words))
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    assert len(ids) == num_words
    # By hand, as the reference trainer does it: one row of max_tokens + 2, cut and filled, then three slices.
    row = [BOS_ID, *ids[:max_tokens], EOS_ID]
    row += [EOS_ID] * (max_tokens + 2 - len(row))
    expected = [[row[0], *row[start : start + 75], row[-1]] for start in range(1, max_tokens + 1, 75)]

    windows, num_tokens = tokenize(tokenizer, [words], max_tokens=max_tokens)

    assert windows[0].tolist() == expected
    assert num_tokens.tolist() == [num_words]


def test_a_window_of_another_size_is_refused(tokenizer, text_model):
    with pytest.raises(ValueError, match=r"one of \(75, 150, 225\), got 77"):
        tokenize(tokenizer, ["a"], max_tokens=77)
    with pytest.raises(ValueError, match=r"\(B, W, 77\), got \(2, 77\)"):
        TextConditioner(text_model)(torch.zeros(2, 77, dtype=torch.int64))
    assert tokenize(tokenizer, [], max_tokens=150).windows.shape == (0, 2, 77)


@pytest.mark.parametrize("use_attention_mask", [False, True])
def test_states_are_taken_before_the_final_norm_and_joined_in_order(tokenizer, text_model, use_attention_mask):
    captions = ["a photo of a cat", "word " * 180, "tag, " * 60]
    windows, _ = tokenize(tokenizer, captions, max_tokens=225)
    flat = windows.reshape(-1, 77)
    mask = real_token_mask(flat) if use_attention_mask else None

    with torch.no_grad():
        states, pooled = TextConditioner(text_model)(windows, use_attention_mask)
        output = text_model(input_ids=flat, attention_mask=mask, output_hidden_states=True)
        normed = text_model.text_model.final_layer_norm(output.hidden_states[-1])

    # Positions of the flattened 231 states that are kept: begin of window 1, 1..75 of each, end of window 3.
    kept = [0, *range(1, 76), *range(78, 153), *range(155, 230), 230]
    before_norm = output.hidden_states[-1].reshape(3, 231, 16)
    torch.testing.assert_close(states, before_norm[:, kept])
    torch.testing.assert_close(normed, output.last_hidden_state)
    assert (normed - output.hidden_states[-1]).abs().max() > 0.1
    first_end = [6, 76, 76]
    by_hand = torch.stack([normed.reshape(3, 3, 77, 16)[index, 0, end] for index, end in enumerate(first_end)])
    torch.testing.assert_close(pooled[:, 0], by_hand @ text_model.text_projection.weight.T)
    assert states.shape == (3, 227, 16) and pooled.shape == (3, 1, 12)


def test_the_mask_ends_with_the_first_end_token():
    windows = torch.tensor([[BOS_ID, 5, EOS_ID, EOS_ID], [BOS_ID, 5, 6, EOS_ID], [BOS_ID, EOS_ID, EOS_ID, EOS_ID]])

    assert real_token_mask(windows).tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]


def test_every_parameter_of_the_conditioner_gets_a_gradient(tokenizer, text_model):
    conditioner = TextConditioner(text_model)
    windows, _ = tokenize(tokenizer, ["a photo of a cat"], max_tokens=150)

    states, pooled = conditioner(windows)
    gradients = torch.autograd.grad(
        states.square().sum() + pooled.square().sum(), list(conditioner.parameters()), allow_unused=True
    )

    assert all(gradient is not None for gradient in gradients)


def test_pooling_at_an_unknown_end_token_is_refused(text_model):
    text_model.config.eos_token_id = 5
    try:
        with pytest.raises(ValueError, match="eos_token_id 5"):
            TextConditioner(text_model)
    finally:
        text_model.config.eos_token_id = EOS_ID


@pytest.mark.parametrize("prefix", ["", "text_encoder.", "text_encoder.clip_g.transformer."])
def test_bare_files_load_with_prefixes_and_stray_position_ids(text_model, tokenizer, prefix, tmp_path):
    tensors = {prefix + key: value for key, value in text_model.state_dict().items()}
    tensors[prefix + "text_model.embeddings.position_ids"] = torch.arange(77)[None]
    write_tensors(tmp_path / "text.safetensors", tensors)
    values = {key: value for key, value in text_model.config.to_dict().items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(values, default=str))
    windows, _ = tokenize(tokenizer, ["a photo of a cat"], max_tokens=75)

    loaded = load_text_model(tmp_path / "text.safetensors", torch.float32, config_path=tmp_path / "config.json")

    with torch.no_grad():
        for ours, theirs in zip(TextConditioner(loaded)(windows), TextConditioner(text_model)(windows), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["text_model.safetensors", "text_encoder"])
def test_saved_text_models_load_again_exactly(text_model, name, tmp_path):
    save_text_model(text_model, tmp_path / name)
    path = tmp_path if name == "text_encoder" else tmp_path / name  # a pipeline folder, or the file

    loaded = load_text_model(path)

    expected = text_model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    assert not loaded.training and loaded.config.hidden_act == "gelu"


def test_the_published_text_model_is_known_by_its_shapes():
    from training.stage_c.text_files import _config_from_shapes

    with torch.device("meta"):
        published = transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(
                hidden_size=1280,
                intermediate_size=5120,
                num_hidden_layers=32,
                num_attention_heads=20,
                projection_dim=1280,
                vocab_size=49_408,
                hidden_act="gelu",
            )
        )
    values = _config_from_shapes(published.state_dict(), "text.safetensors")

    assert sum(parameter.numel() for parameter in published.parameters()) == 694_659_840
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "projection_dim"):
        assert values[key] == getattr(published.config, key)


def test_text_errors_say_what_is_missing(text_model, tmp_path):
    tensors = dict(text_model.state_dict())
    write_tensors(tmp_path / "narrow.safetensors", tensors)
    del tensors["text_projection.weight"]
    write_tensors(tmp_path / "no_projection.safetensors", tensors)

    with pytest.raises(WeightsError, match="pass config_path"):
        load_text_model(tmp_path / "narrow.safetensors")
    with pytest.raises(WeightsError, match=r"text_projection\.weight"):
        load_text_model(tmp_path / "no_projection.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no config\.json here or in text_encoder/"):
        load_text_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "absent")
