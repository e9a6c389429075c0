"""Latents that are not finite: made again in fp32, or their picture is left out."""

import pytest
import torch

from tests.training.toy import toy_config
from training.stage_c.effnet import EffNetConfig, EffNetEncoder, save_effnet
from training.stage_c.latents import NOT_FINITE, LatentEncoder

TINY = EffNetConfig(stem_width=8, widths=(8, 8, 12, 16, 20, 24), depths=(1, 2, 1, 2, 1, 2), head_width=32)


@pytest.fixture
def encoder_of(tmp_path):
    torch.manual_seed(0)
    save_effnet(EffNetEncoder(TINY), tmp_path / "effnet.safetensors")

    def make(**stage_c):
        settings = toy_config(stage_c={"effnet": str(tmp_path / "effnet.safetensors"), **stage_c}).stage_c
        return LatentEncoder(settings, device=torch.device("cpu"))

    return make


def pictures(*levels):
    random = torch.Generator().manual_seed(0)
    return torch.stack(
        [torch.randint(0, level + 1, (3, 64, 96), generator=random, dtype=torch.uint8) for level in levels]
    )


def spoil(encoder, *, formats):
    """Let a picture with a white pixel overflow in these compute formats; returns the formats it was asked for."""
    asked, real = [], encoder.effnet.encode

    def encode(rgb, *, compute=torch.float32):
        latents = real(rgb, compute=compute)
        asked.append((compute, len(rgb)))
        if compute in formats:
            latents[rgb.amax(dim=(1, 2, 3)) == 1, 3, 1, 2] = torch.inf
        return latents

    encoder.effnet.encode = encode
    return asked


def test_bf16_is_close_to_fp32_and_not_the_same(encoder_of):
    exact, fast = (encoder_of(effnet_dtype=dtype).encode(pictures(255, 200)).values for dtype in ("fp32", "bf16"))

    assert exact.dtype == fast.dtype == torch.float32
    assert 0 < (fast - exact).abs().max() < 0.1 * exact.std()


def test_what_bf16_cannot_hold_is_made_again_in_fp32_and_only_that(encoder_of):
    images = pictures(100, 255, 100)
    plain, exact = encoder_of(effnet_dtype="bf16").encode(images), encoder_of().encode(images)
    encoder = encoder_of(effnet_dtype="bf16")
    asked = spoil(encoder, formats=(torch.bfloat16,))

    latents = encoder.encode(images)

    assert asked[-1] == (torch.float32, 1) and [size for dtype, size in asked if dtype == torch.float32] == [1]
    assert latents.broken == {}
    assert torch.equal(latents.values[1], exact.values[1])
    assert torch.equal(latents.values[[0, 2]], plain.values[[0, 2]])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_is_not_finite_in_fp32_either_is_broken_and_zeros(encoder_of, dtype):
    encoder = encoder_of(effnet_dtype=dtype)
    spoil(encoder, formats=(torch.float32, torch.bfloat16))

    latents = encoder.encode(pictures(100, 255, 100, 255))

    assert latents.broken == {1: NOT_FINITE, 3: NOT_FINITE}
    assert latents.values.isfinite().all() and not latents.values[[1, 3]].any() and latents.values[[0, 2]].any()
