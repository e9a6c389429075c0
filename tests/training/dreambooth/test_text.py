"""SD's text conditioning against transformers, diffusers and windows made by hand."""

import pytest
import torch

from tests.training.dreambooth.test_single_file import TEXTS
from tests.training.dreambooth.toy_sd import toy_text, toy_unet, toy_vae
from training.dreambooth.text import SdText, pad_ids, tokenize
from training.stage_c.text import BOS_ID, EOS_ID, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("builtin")


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def windows_of(family, tokenizer, captions, max_tokens=75):
    return [tokenize(tokenizer, captions, max_tokens=max_tokens, pad_id=pad).windows for pad in pad_ids(family)]


@pytest.mark.parametrize("pad_id", [EOS_ID, 0])
def test_a_short_caption_in_one_window_is_what_a_tokenizer_makes(tokenizer, pad_id):
    (row,) = tokenize(tokenizer, ["gotou hitori, smile"], max_tokens=75, pad_id=pad_id).windows[0]
    own = ids_of(tokenizer, "gotou hitori, smile")

    assert row.tolist() == [BOS_ID, *own, EOS_ID, *[pad_id] * (75 - len(own))]


@pytest.mark.parametrize(
    ("num_words", "pad_id"), [(74, 0), (75, 0), (76, 0), (149, 0), (150, 0), (160, 0), (80, EOS_ID)]
)
def test_two_windows_hold_150_tokens_and_end_as_kohyas_do(tokenizer, num_words, pad_id):
    text = " ".join(["cat"] * num_words)
    cat = ids_of(tokenizer, "cat")[0]
    whole = [BOS_ID, *([cat] * num_words)[:150], EOS_ID]
    whole += [pad_id] * (152 - len(whole))

    wanted = []
    for start in (1, 76):
        window = [whole[0], *whole[start : start + 75], whole[-1]]
        if pad_id != EOS_ID:
            if window[-2] not in (EOS_ID, pad_id):
                window[-1] = EOS_ID
            if window[1] == pad_id:
                window[1] = EOS_ID
        wanted.append(window)

    tokens = tokenize(tokenizer, [text], max_tokens=150, pad_id=pad_id)

    assert tokens.windows[0].tolist() == wanted
    assert tokens.num_tokens.tolist() == [num_words]


@pytest.mark.parametrize("clip_skip", [1, 2, 3])
def test_clip_skip_reads_the_layer_that_a1111_reads(tokenizer, clip_skip):
    text = toy_text()
    (windows,) = windows_of("sd1", tokenizer, ["a cat", "two cats"])
    inner = getattr(text, "text_model", text)

    states, pooled = SdText("sd1", [text], clip_skip=clip_skip)(windows)

    with torch.no_grad():
        hidden = text(windows[:, 0], output_hidden_states=True).hidden_states
        last = text(windows[:, 0]).last_hidden_state
        expected = last if clip_skip == 1 else inner.final_layer_norm(hidden[-clip_skip])
    assert pooled is None
    assert torch.allclose(states, expected, atol=1e-6)


def test_sdxl_is_conditioned_as_diffusers_conditions_it(tokenizer):
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    from training.stage_c.text import load_tokenizer

    texts = [make() for make in TEXTS["sdxl"]]
    second = load_tokenizer("builtin")
    second.pad_token = "!"
    pipeline = StableDiffusionXLPipeline(
        toy_vae(), *texts, tokenizer, second, toy_unet("sdxl"), EulerDiscreteScheduler(), add_watermarker=False
    )
    wanted, _, wanted_pooled, _ = pipeline.encode_prompt("1girl, gotou hitori", do_classifier_free_guidance=False)

    states, pooled = SdText("sdxl", texts)(*windows_of("sdxl", tokenizer, ["1girl, gotou hitori"]))

    assert torch.allclose(states, wanted, atol=1e-5)
    assert torch.allclose(pooled, wanted_pooled, atol=1e-5)


@pytest.mark.parametrize(("family", "clip_skip"), [("sd1", 1), ("sd1", 2), ("sd2", 1), ("sdxl", 1)])
def test_every_parameter_that_is_left_trainable_gets_a_gradient(tokenizer, family, clip_skip):
    module = SdText(family, [make() for make in TEXTS[family]], clip_skip=clip_skip)

    states, pooled = module(*windows_of(family, tokenizer, ["a cat"], 150))
    (states.square().sum() + (0 if pooled is None else pooled.square().sum())).backward()

    without = [name for name, one in module.named_parameters() if one.requires_grad and one.grad is None]
    assert without == []
    assert states.shape[1] == 152


def test_a_clip_skip_beyond_the_first_layer_is_refused():
    with pytest.raises(ValueError, match="3 layers"):
        SdText("sd1", [toy_text()], clip_skip=4)
