"""Pictures against diffusers' own pipelines, on toy-size SD 1, SD 2 and SDXL."""

from dataclasses import replace
from functools import lru_cache

import diffusers
import numpy as np
import pytest
import torch

from tests.training.dreambooth.toy_sd import toy_text, toy_unet, toy_vae
from training.config import Prompt
from training.config.dreambooth import SAMPLERS
from training.dreambooth.diffusion.schedule import NoiseSchedule
from training.dreambooth.sampling.drawing import NotFiniteError, decode, draw_latents, draw_pictures
from training.dreambooth.sampling.networks import SdPictures
from training.dreambooth.sampling.samplers import make_scheduler
from training.dreambooth.sd_models.prediction import Prediction
from training.dreambooth.text import SdText, pad_ids, tokenize
from training.stage_c.text import load_tokenizer

EPSILON = Prediction("epsilon", False, "the test")
V = Prediction("v_prediction", False, "the test")
ZERO_SNR = Prediction("v_prediction", True, "the test")
SD1_FILE = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "set_alpha_to_one": False, "clip_sample": False, "steps_offset": 1,
}  # fmt: skip
"""scheduler_config.json of SD 1.5, from which people make diffusers' other schedulers."""
CLASSES = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    "dpm++_2m": diffusers.DPMSolverMultistepScheduler,
    "dpm++_2m_karras": diffusers.DPMSolverMultistepScheduler,
}


def scheduler_of_diffusers(sampler, prediction):
    changes = {"use_karras_sigmas": True} if sampler.endswith("karras") else {}
    if prediction.zero_terminal_snr:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return CLASSES[sampler].from_config(SD1_FILE, prediction_type=prediction.kind, **changes)


@lru_cache(maxsize=2)
def tokenizer(pad_token="<|endoftext|>"):
    made = load_tokenizer("builtin")
    made.pad_token = pad_token
    return made


def networks_of(family, *, clip_skip=1, prediction=EPSILON, max_tokens=75):
    texts = [toy_text()] if family != "sdxl" else [toy_text(), toy_text(projection=True, act="gelu")]
    return SdPictures(
        family, toy_unet(family), toy_vae(), SdText(family, texts, clip_skip=clip_skip), tokenizer(), prediction,
        max_tokens,
    )  # fmt: skip


@pytest.fixture(scope="module")
def sd1():
    return networks_of("sd1")


@pytest.fixture(scope="module")
def sdxl():
    return networks_of("sdxl")


def prompt(**changes):
    values = {"text": "gotou hitori, smile", "negative": "blurry", "width": 24, "height": 16, "steps": 3, "seed": 7}
    return Prompt(**{**values, "guidance": 5.0, "sampler": "ddim", **changes})


def pipeline_of(networks, sampler="ddim"):
    parts = {
        "vae": networks.vae,
        "unet": networks.unet,
        "scheduler": scheduler_of_diffusers(sampler, networks.prediction),
        "text_encoder": networks.text.texts[0],
        "tokenizer": networks.tokenizer,
    }
    if networks.family == "sdxl":
        made = diffusers.StableDiffusionXLPipeline(
            **parts, text_encoder_2=networks.text.texts[1], tokenizer_2=tokenizer("!"), add_watermarker=False
        )
    else:
        made = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    made.set_progress_bar_config(disable=True)
    return made


def drawn_by_diffusers(networks, one, **given):
    texts = {"prompt": one.text, "negative_prompt": one.negative or ("" if networks.family != "sdxl" else None)}
    rescale = 0.7 if networks.prediction.zero_terminal_snr else 0.0
    return pipeline_of(networks, one.sampler)(
        **(given or texts), width=one.width, height=one.height, num_inference_steps=one.steps,
        guidance_scale=one.guidance, guidance_rescale=rescale, generator=torch.Generator().manual_seed(one.seed),
        output_type="latent",
    ).images  # fmt: skip


def states(networks, text, max_tokens=75):
    windows = [
        tokenize(networks.tokenizer, [text], max_tokens=max_tokens, pad_id=pad).windows
        for pad in pad_ids(networks.family)
    ]
    with torch.no_grad():
        return networks.text(*windows)


@pytest.mark.parametrize(
    ("family", "prediction"),
    [("sd1", EPSILON), ("sd1", ZERO_SNR), ("sdxl", EPSILON), ("sdxl", V)],
    ids=["sd1-epsilon", "sd1-zero_snr", "sdxl-epsilon", "sdxl-v"],
)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_latents_are_those_of_diffusers_pipeline(family, sampler, prediction, sd1, sdxl):
    networks = replace(sd1 if family == "sd1" else sdxl, prediction=prediction)
    one = prompt(sampler=sampler)

    ours = draw_latents([one], networks=networks)

    torch.testing.assert_close(ours, drawn_by_diffusers(networks, one), rtol=1e-4, atol=1e-4)
    assert ours.shape == (1, 4, 8, 12)


@pytest.mark.parametrize(("family", "clip_skip"), [("sd1", 2), ("sd2", 1)])
def test_clip_skip_and_sd2s_padding_reach_the_picture(family, clip_skip, sd1):
    networks = networks_of(family, clip_skip=clip_skip, prediction=V)
    one = prompt(negative="")

    ours = draw_latents([one], networks=networks)
    given = {"prompt_embeds": states(networks, one.text)[0], "negative_prompt_embeds": states(networks, "")[0]}

    torch.testing.assert_close(ours, drawn_by_diffusers(networks, one, **given), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, draw_latents([one], networks=replace(sd1, prediction=V)), atol=1e-3)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_long_prompts_and_negatives_are_read_in_windows(family, sd1, sdxl):
    networks = sd1 if family == "sd1" else sdxl
    one = prompt(text="cat " * 100 + "dog", max_tokens=150)
    text, negative = (states(networks, words, 150) for words in (one.text, one.negative))
    given = {"prompt_embeds": text[0], "negative_prompt_embeds": negative[0]}
    if family == "sdxl":
        given |= {"pooled_prompt_embeds": text[1], "negative_pooled_prompt_embeds": negative[1]}

    ours = draw_latents([one], networks=networks)

    torch.testing.assert_close(ours, drawn_by_diffusers(networks, one, **given), rtol=1e-4, atol=1e-4)
    of_the_run = draw_latents([one.model_copy(update={"max_tokens": None})], networks=replace(networks, max_tokens=150))
    assert torch.equal(ours, of_the_run)
    assert not torch.equal(ours, draw_latents([one.model_copy(update={"max_tokens": 75})], networks=networks))


def test_strict_tokens_leave_out_a_tag_that_does_not_fit(sd1):
    networks = replace(sd1, strict_tokens=True)
    words = "cat " * 70

    drawn = draw_latents([prompt(text=f"{words}, one two three four five six")], networks=networks)

    assert torch.equal(drawn, draw_latents([prompt(text=words)], networks=networks))
    assert not torch.equal(drawn, draw_latents([prompt(text=f"{words}, one two three four five six")], networks=sd1))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_without_a_negative_prompt_guidance_goes_away_from_what_diffusers_does(family, sd1, sdxl):
    networks = sd1 if family == "sd1" else sdxl
    one = prompt(negative="")

    ours = draw_latents([one], networks=networks)

    torch.testing.assert_close(ours, drawn_by_diffusers(networks, one), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_picture_is_that_of_diffusers(family):
    one, networks = prompt(width=40, height=56, sampler="euler_a"), networks_of(family)
    if family == "sdxl":
        networks.vae.register_to_config(latents_mean=[0.5, 0, 0, 1], latents_std=[1.0, 2, 3, 4], scaling_factor=0.13)
    theirs = pipeline_of(networks, "euler_a")(
        one.text, negative_prompt=one.negative, width=40, height=56, num_inference_steps=3, guidance_scale=5.0,
        generator=torch.Generator().manual_seed(7),
    ).images[0]  # fmt: skip

    (ours,) = draw_pictures([one], networks=networks)

    assert ours.size == (40, 56)
    assert np.abs(np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int)).max() <= 1


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_sides_may_be_any_multiple_of_a_latents_pixels(family, sd1, sdxl):
    (picture,) = draw_pictures([prompt(width=18, height=26)], networks=sd1 if family == "sd1" else sdxl)

    assert picture.size == (18, 26)


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_without_guidance_the_negative_is_not_computed(sd1, guidance):
    sizes = []
    handle = sd1.unet.register_forward_pre_hook(lambda _module, inputs: sizes.append(len(inputs[0])))

    with_negative = draw_latents([prompt(guidance=guidance)], networks=sd1)
    handle.remove()

    assert set(sizes) == {1}
    assert torch.equal(with_negative, draw_latents([prompt(guidance=guidance, negative="")], networks=sd1))


@pytest.mark.parametrize("sampler", ["ddpm", "euler_a", "dpm++_2m_karras"])
def test_a_picture_does_not_depend_on_which_others_are_drawn(sd1, sampler):
    prompts = [prompt(sampler=sampler, seed=seed) for seed in (1, 2)]
    prompts.append(prompt(sampler=sampler, seed=1, width=16))
    drawn = list(draw_pictures(prompts, networks=sd1, batch_size=3))

    alone = [next(draw_pictures([one], networks=sd1)) for one in prompts]

    assert [one.tobytes() for one in drawn] == [one.tobytes() for one in alone]
    assert drawn[0].tobytes() != drawn[1].tobytes()


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpm++_2m_karras"])
def test_pictures_drawn_at_once_are_those_drawn_alone_but_for_rounding(sdxl, sampler):
    prompts = [prompt(sampler=sampler, seed=1), prompt(sampler=sampler, seed=2, text="ryou", negative="")]

    both = draw_latents(prompts, networks=sdxl)

    alone = torch.cat([draw_latents([one], networks=sdxl) for one in prompts])
    torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-4)


def test_prompts_of_other_settings_are_not_drawn_at_once(sd1):
    with pytest.raises(ValueError, match="prompts of one batch differ"):
        draw_latents([prompt(), prompt(steps=5)], networks=sd1)


def test_modes_gradients_and_global_randomness_stay_as_they_are(sd1):
    sd1.unet.train()
    sd1.unet.mid_block.eval()
    modes = [module.training for module in sd1.unet.modules()]
    before = torch.get_rng_state()
    pictures = draw_pictures([prompt(sampler="ddpm")] * 2, networks=sd1)

    next(pictures)
    has_graph = torch.is_grad_enabled()
    list(pictures)

    assert [module.training for module in sd1.unet.modules()] == modes and has_graph
    assert torch.equal(torch.get_rng_state(), before)
    sd1.unet.eval()


def test_dropout_of_a_network_in_training_is_off_while_it_draws(sd1):
    class Dropping(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.dropout(x, 0.9, training=self.training)

    networks = networks_of("sd1")
    networks.unet.conv_in = torch.nn.Sequential(networks.unet.conv_in, Dropping())
    networks.unet.train()

    assert torch.equal(draw_latents([prompt()], networks=networks), draw_latents([prompt()], networks=sd1))


def test_what_comes_out_not_finite_in_half_is_drawn_again_in_fp32():
    networks = networks_of("sd1")
    wanted = draw_latents([prompt()], networks=networks)
    networks.unet.conv_in.register_forward_hook(
        lambda _module, _inputs, output: output * torch.inf if output.dtype == torch.bfloat16 else None
    )
    networks.unet.to(torch.bfloat16)
    held = {name: tensor.clone() for name, tensor in networks.unet.state_dict().items()}

    drawn = draw_latents([prompt(seed=1), prompt()], networks=networks)[1:]

    torch.testing.assert_close(drawn, wanted, rtol=0.2, atol=0.2)
    assert all(torch.equal(tensor, held[name]) for name, tensor in networks.unet.state_dict().items())
    assert networks.unet.dtype == torch.bfloat16


def test_under_autocast_an_overflow_is_drawn_again_without(sd1):
    networks = networks_of("sd1")
    networks.unet.conv_in.register_forward_hook(
        lambda _module, _inputs, output: output * torch.inf if output.dtype == torch.bfloat16 else None
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        drawn = draw_latents([prompt()], networks=networks)

    assert torch.equal(drawn, draw_latents([prompt()], networks=sd1))


def test_a_vae_in_half_decodes_in_fp32(sd1):
    networks = networks_of("sd1")
    latents = draw_latents([prompt()], networks=sd1)
    networks.vae.to(torch.bfloat16)
    rounded = networks_of("sd1")
    rounded.vae.to(torch.bfloat16).float()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        picture = decode(latents, networks=networks)

    assert picture.tobytes() == decode(latents, networks=rounded).tobytes()
    assert networks.vae.dtype == torch.bfloat16


def test_a_broken_model_is_told():
    networks = networks_of("sd1")
    with torch.no_grad():
        networks.unet.conv_out.bias.fill_(torch.nan)

    with pytest.raises(NotFiniteError, match="'gotou hitori, smile': the model draws no numbers, in fp32, too"):
        next(draw_pictures([prompt()], networks=networks))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "unipc"}, "sampler 'unipc': choose one of ddim, ddpm"),
        ({"width": 17}, "a picture of 17x16: 17 is not a multiple of 2"),
        ({"steps": 1000}, "1000 sampling steps: must be 1 to 999"),
    ],
)
def test_what_cannot_be_drawn_is_refused(sd1, changes, message):
    with pytest.raises(ValueError, match=message):
        draw_latents([prompt(**changes)], networks=sd1)


@pytest.mark.parametrize("prediction", [EPSILON, V, ZERO_SNR])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_run_on_the_schedule_that_is_trained(sampler, prediction):
    wanted = NoiseSchedule.make(zero_terminal_snr=prediction.zero_terminal_snr).alphas_cumprod

    scheduler = make_scheduler(sampler, steps=10, prediction=prediction)

    torch.testing.assert_close(scheduler.alphas_cumprod, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 61, 999])
def test_there_are_as_many_timesteps_as_steps(sampler, steps):
    scheduler = make_scheduler(sampler, steps=steps, prediction=ZERO_SNR)

    assert len(scheduler.timesteps) == scheduler.num_inference_steps == steps
    assert scheduler.timesteps[0] == 999 and scheduler.timesteps.min() >= 0
    if hasattr(scheduler, "sigmas") and not sampler.startswith("dd"):
        assert len(scheduler.sigmas) == steps + 1 and scheduler.sigmas[-1] == 0
