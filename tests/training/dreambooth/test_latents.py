"""Pictures → latents: diffusers' distribution, its scaling, formats that overflow, and counted randomness."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL

from tests.training.dreambooth.toy_recipe import part_of, sd_batch, sd_config
from training.dreambooth import latents
from training.dreambooth.latents import NOT_FINITE, VaeEncoder
from training.randomness import normal

BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}


def make_vae(**settings):
    torch.manual_seed(1)
    return AutoencoderKL(block_out_channels=(32,) * 4, latent_channels=4, layers_per_block=1, **BLOCKS, **settings)


@pytest.fixture(scope="module")
def vae():
    return make_vae(scaling_factor=0.13025)


def encoder_of(vae, **settings):
    return VaeEncoder(sd_config("none", **settings).of_dreambooth, device=torch.device("cpu"), vae=vae)


def test_what_is_kept_of_a_picture_is_diffusers_distribution(vae):
    images = sd_batch().images
    with torch.no_grad():
        expected = vae.encode(images.float() / 127.5 - 1).latent_dist.parameters

    made = encoder_of(vae).encode(images)

    assert made.values.shape == (2, 8, 8, 12) and not made.broken
    torch.testing.assert_close(made.values, expected, rtol=1e-4, atol=1e-5)


def test_a_latent_is_drawn_as_diffusers_draws_and_anew_in_each_epoch(vae):
    encoder, batch = encoder_of(vae), sd_batch()
    with torch.no_grad():
        latent = vae.encode(batch.images.float() / 127.5 - 1).latent_dist
    noise = torch.stack([torch.from_numpy(normal(one, "latent", (4, 8, 12))) for one in batch.identities])

    found = encoder.of(batch).values

    torch.testing.assert_close(found, (latent.mean + latent.std * noise) * 0.13025, rtol=1e-4, atol=1e-5)
    assert torch.equal(found, encoder.of(batch).values)
    assert torch.equal(found[1:], encoder.of(part_of(batch, [1])).values)
    assert not torch.equal(found, encoder.of(sd_batch(epoch=1)).values)


def test_the_mean_is_the_same_in_every_epoch(vae):
    encoder, batch = encoder_of(vae, latent_draw="mean"), sd_batch()
    with torch.no_grad():
        mean = vae.encode(batch.images.float() / 127.5 - 1).latent_dist.mean

    found = encoder.of(batch).values

    torch.testing.assert_close(found, mean * 0.13025, rtol=1e-4, atol=1e-5)
    assert torch.equal(found, encoder.of(sd_batch(epoch=1)).values)


def test_a_vae_with_mean_and_spread_of_its_latents_is_shifted_by_them():
    mean, std = [0.1, -0.2, 0.3, 0.0], [2.0, 3.0, 4.0, 5.0]
    plain = encoder_of(make_vae(scaling_factor=0.5), latent_draw="mean").of(sd_batch()).values
    shifted = make_vae(scaling_factor=0.5, latents_mean=mean, latents_std=std)

    found = encoder_of(shifted, latent_draw="mean").of(sd_batch()).values

    as_tensor = {name: torch.tensor(values).view(1, 4, 1, 1) for name, values in {"mean": mean, "std": std}.items()}
    torch.testing.assert_close(found, (plain / 0.5 - as_tensor["mean"]) * 0.5 / as_tensor["std"])


def test_latents_made_ahead_are_drawn_alike_and_leave_the_vae_where_it_is(vae):
    batch, encoder = sd_batch(), encoder_of(vae)
    stored = encoder_of(vae).encode(batch.images).values

    found = encoder.of(replace(batch, images=None, latents=stored)).values

    assert torch.equal(found, encoder_of(vae).of(batch).values)
    assert "vae" not in vars(encoder)


@pytest.mark.parametrize("vae_dtype", ["fp16", "bf16"])
def test_a_lower_format_is_used_and_what_overflows_in_it_is_made_again_in_fp32(vae, monkeypatch, vae_dtype):
    images, encoder = sd_batch().images, encoder_of(vae, vae_dtype=vae_dtype)
    exact = encoder_of(vae).encode(images).values
    moments, asked = VaeEncoder._moments, []

    def overflowing(self, pixels, compute):
        asked.append((len(pixels), compute))
        values = moments(self, pixels, compute)
        if compute != torch.float32 and torch.equal(pixels, images[1:].float() / 127.5 - 1):
            values[0, 3, 2, 1] = torch.nan
        return values

    monkeypatch.setattr(VaeEncoder, "_moments", overflowing)
    found = encoder.encode(images)

    low = latents.DTYPES[vae_dtype]
    assert asked == [(1, low), (1, low), (1, torch.float32)] and not found.broken
    assert torch.equal(found.values[1], exact[1])
    assert not torch.equal(found.values[0], exact[0])
    torch.testing.assert_close(found.values[0], exact[0], rtol=0.1, atol=0.1)


def test_what_is_not_finite_in_fp32_either_is_broken_and_the_others_are_not(vae, monkeypatch):
    images = sd_batch().images
    moments = VaeEncoder._moments

    def broken(self, pixels, compute):
        values = moments(self, pixels, compute)
        return values * torch.inf if torch.equal(pixels, images[:1].float() / 127.5 - 1) else values

    monkeypatch.setattr(VaeEncoder, "_moments", broken)

    found = encoder_of(vae, vae_dtype="fp16").encode(images)

    assert found.broken == {0: NOT_FINITE}
    assert not found.values[0].any() and found.values[1].any()


def test_the_vae_does_not_run_under_the_autocast_of_training(vae):
    images, encoder = sd_batch().images, encoder_of(vae)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = encoder.encode(images).values

    assert torch.equal(found, encoder.encode(images).values)
