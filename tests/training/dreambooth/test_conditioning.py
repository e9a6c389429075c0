"""Captions → windows → states, made ahead or not, and SDXL's six numbers."""

from dataclasses import replace

import pytest
import torch

from tests.training.dreambooth.toy_adapters import plain_tokenizer
from tests.training.dreambooth.toy_recipe import FAMILIES, HEIGHT, LONG, WIDTH, sd_batch, sd_config
from tests.training.dreambooth.toy_sd import toy_text
from training.dreambooth.conditioning import Conditioning, time_ids
from training.dreambooth.text import SdText

CPU = torch.device("cpu")


def conditioning_of(family, **settings):
    texts = [toy_text()] + ([toy_text(projection=True)] if family == "sdxl" else [])
    recipe = sd_config("none", **settings).of_dreambooth
    text = SdText(family, texts, clip_skip=recipe.clip_skip).requires_grad_(False).eval()
    return Conditioning(recipe, text, plain_tokenizer(), device=CPU)


@pytest.mark.parametrize("max_tokens", [75, 150, 225])
@pytest.mark.parametrize("family", FAMILIES)
def test_long_captions_have_so_many_windows_and_what_is_cut_is_counted(family, max_tokens):
    made = conditioning_of(family, max_tokens=max_tokens)

    windows, cut = made.tokens([LONG, "rin"])

    assert [one.shape for one in windows] == [(2, max_tokens // 75, 77)] * (2 if family == "sdxl" else 1)
    num_tokens = len(plain_tokenizer()(LONG, add_special_tokens=False)["input_ids"])
    assert cut.tolist() == [max(0, num_tokens - max_tokens), 0] and 75 < num_tokens < 150
    states, pooled = made.states(windows)
    assert states.shape == (2, max_tokens + 2, 128 if family == "sdxl" else 64)
    assert (pooled is None) == (family != "sdxl")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_made_ahead_is_what_is_made_meanwhile(family):
    made, batch = conditioning_of(family), sd_batch(("rin, a girl", "a castle", ""))
    windows, _ = made.tokens(batch.captions)

    expected = made.states_of(batch, windows)
    stored = tuple(torch.cat([one[slot : slot + 1] for slot in range(3)]) for one in made.encode(batch.captions))
    found = made.states_of(replace(batch, text=stored), windows)

    assert torch.equal(found[0], expected[0])
    assert (found[1] is None and expected[1] is None) or torch.equal(found[1], expected[1])


def test_each_sample_has_its_own_size_and_crop_also_from_latents():
    batch = sd_batch(("a", "b"))
    expected = [[100.0, 200.0, 0.0, 0.0, HEIGHT, WIDTH], [103.0, 201.0, 1.0, 5.0, HEIGHT, WIDTH]]

    assert time_ids(batch, pixels_per_latent=8, device=CPU).tolist() == expected
    ahead = replace(batch, images=None, latents=torch.zeros(2, 8, HEIGHT // 8, WIDTH // 8))
    assert time_ids(ahead, pixels_per_latent=8, device=CPU).tolist() == expected


def test_digests_are_of_frozen_text_models_only():
    made = conditioning_of("sd1")
    frozen = made.digests()
    trained = Conditioning(made._settings, made.text, made.tokenizer, device=CPU, has_gradients=True).digests()

    assert set(frozen) == {"dreambooth.tokenizer", "dreambooth.text_encoders"}
    assert trained == {"dreambooth.tokenizer": frozen["dreambooth.tokenizer"]}
