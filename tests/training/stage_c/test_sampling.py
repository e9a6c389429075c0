"""Previews against a plain sampling loop written out here, and what a prompt may say otherwise than training."""

import math

import pytest
import torch

from scripts.demo_models.stage_c import make_stage_c_models
from tests.training.small_stage_c import small_config
from training.config import Prompt
from training.randomness import SampleIdentity, normal
from training.stage_c.conditioning import Conditioning
from training.stage_c.formats import load_stage_c
from training.stage_c.sampling import draw_latents
from training.stage_c.text import encode, tokenize


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return make_stage_c_models(tmp_path_factory.mktemp("models"), seed=0)


@pytest.fixture(scope="module")
def network(paths):
    return load_stage_c(paths["stage_c"]).eval()


class Drawn:
    """What the network was asked while a prompt was drawn."""

    def __init__(self, paths, network, prompt, **stage_c):
        settings = small_config(paths, **stage_c).stage_c
        self.conditioning = Conditioning(settings, device=torch.device("cpu"), dtype=torch.float32)
        self.asked = []
        handle = network.register_forward_pre_hook(lambda _, inputs: self.asked.append(inputs))
        try:
            self.latents = draw_latents(
                Prompt(**prompt), network=network, conditioning=self.conditioning, settings=settings
            )
        finally:
            handle.remove()
        self.x, self.r, self.text, self.pooled = self.asked[0]


PROMPT = {"text": "a cat on a mat", "negative": "blurry", "width": 256, "height": 192, "seed": 7, "steps": 5}


def plain_loop(network, noises, text, pooled, *, steps, shift, cfg, ancestral):
    """DDPM of the published schedule in floats, one network call per condition."""

    def scales(t):
        s = 0.008
        alpha_bar = math.cos((s + t) / (1 + s) * math.pi / 2) ** 2 / math.cos(s / (1 + s) * math.pi / 2) ** 2
        alpha_bar = min(max(alpha_bar, 1e-4), 0.9999)
        limit = math.log(0.9999 / 1e-4)
        logsnr = min(max(math.log(alpha_bar / (1 - alpha_bar)) + 2 * math.log(1 / shift), -limit), limit)
        a2 = 1 / (1 + math.exp(-logsnr))
        r = math.acos(math.sqrt(a2 * math.cos(s / (1 + s) * math.pi / 2) ** 2)) / (math.pi / 2) * (1 + s) - s
        return math.sqrt(a2), math.sqrt(1 - a2), r

    x = noises[0]
    for step in range(steps):
        (a, b, r), (a_next, b_next, _) = scales(1 - step / steps), scales(1 - (step + 1) / steps)
        with torch.no_grad():
            positive, negative = (
                network(x, torch.tensor([r]), text[row : row + 1], pooled[row : row + 1]) for row in (0, 1)
            )
        guided = negative + cfg * (positive - negative)
        rescaled = guided * positive.std() / guided.std()
        epsilon = 0.7 * rescaled + 0.3 * guided
        clean = (x - b * epsilon) / a
        if step + 1 < steps:
            sigma = b_next / b * math.sqrt(1 - a**2 / a_next**2) if ancestral else 0.0
            x = a_next * clean + math.sqrt(b_next**2 - sigma**2) * epsilon + sigma * noises[step + 1]
    return clean


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_preview_is_what_a_plain_loop_gives(paths, network, sampler):
    drawn = Drawn(paths, network, {**PROMPT, "sampler": sampler, "guidance": 3.0}, max_tokens=150, attention_mask=False)
    identity = SampleIdentity(seed=7, epoch=0, chunk="preview", key="256x192")
    noises = [
        torch.from_numpy(normal(identity, f"noise {step}", (1, 16, 5, 6))) for step in range(5)
    ]  # ceil(192 · ¾ / 32)
    windows = tokenize(drawn.conditioning.tokenizer, ["a cat on a mat", "blurry"], max_tokens=150).windows
    with torch.no_grad():
        text, pooled = encode(drawn.conditioning.text.text_model, windows, use_attention_mask=False)

    expected = plain_loop(network, noises, text, pooled, steps=5, shift=2.0, cfg=3.0, ancestral=sampler == "ddpm")

    assert drawn.latents.shape == (1, 16, 5, 6)
    torch.testing.assert_close(drawn.latents / expected.std(), expected / expected.std(), rtol=0, atol=2e-4)


def test_density_windows_and_mask_are_those_of_training(paths, network):
    as_official = Drawn(paths, network, PROMPT)
    as_kohya = Drawn(paths, network, PROMPT, encode_scale=1.0, max_tokens=225, attention_mask=False)

    assert (as_official.x.shape, as_official.text.shape[1]) == ((2, 16, 5, 6), 77)
    assert (as_kohya.x.shape, as_kohya.text.shape[1]) == ((2, 16, 6, 8), 227)
    assert not torch.allclose(as_official.text[:, 20], as_kohya.text[:, 20])  # a state of padding


def test_a_prompt_may_say_otherwise(paths, network):
    training = {"encode_scale": 1.0, "max_tokens": 225, "attention_mask": False}
    other = {"encode_scale": 0.75, "max_tokens": 75, "attention_mask": True}

    drawn, official = Drawn(paths, network, {**PROMPT, **other}, **training), Drawn(paths, network, PROMPT)

    assert torch.equal(drawn.latents, official.latents)


def test_what_guidance_goes_away_from_is_an_encoded_text_not_zeros(paths, network):
    plain = Drawn(paths, network, {**PROMPT, "negative": ""})
    with torch.no_grad():
        empty = plain.conditioning.encode([""])

    torch.testing.assert_close(plain.text[1:], empty[0])
    torch.testing.assert_close(plain.pooled[1:], empty[1])
    assert plain.text[1].abs().mean() > 0.1
    assert not torch.allclose(Drawn(paths, network, PROMPT).text[1], plain.text[1])


def test_preview_shift_changes_the_noise_levels_and_the_seed_the_picture(paths, network):
    plain, shifted = Drawn(paths, network, PROMPT), Drawn(paths, network, PROMPT, preview_shift=1.0)

    assert [inputs[1][0].item() for inputs in plain.asked] != [inputs[1][0].item() for inputs in shifted.asked]
    assert not torch.allclose(Drawn(paths, network, {**PROMPT, "seed": 8}).latents, plain.latents)
    assert torch.equal(Drawn(paths, network, PROMPT).latents, plain.latents)
