"""Diffusion arithmetic against closed-form values of the published schedule."""

import math
from collections.abc import Callable

import pytest
import torch

from training.stage_c.gdf import (
    AdaptiveLossWeight,
    diffuse,
    guide,
    logsnr_from_timestep,
    noise_level,
    p2_weight,
    sample,
    signal_and_noise_scale,
    timestep_from_uniform,
)


def logsnr(t: float, shift: float = 1.0) -> float:
    return logsnr_from_timestep(torch.tensor([t]), shift=shift).item()


@pytest.mark.parametrize(
    ("t", "shift", "expected"),
    [
        (0.1, 1, 3.5506),
        (0.5, 1, -0.0246),
        (0.9, 1, -3.7015),
        (1.0, 1, -9.21024),
        (0.0, 1, 9.21024),
        (1.0, 2, -9.21024),
        (0.75, 2, -3.167),
        (0.5, 2, -1.411),
        (0.25, 2, 0.325),
        (0.0, 2, 7.824),
    ],
)
def test_logsnr_has_its_closed_form_values(t, shift, expected):
    assert logsnr(t, shift) == pytest.approx(expected, abs=1e-3 if shift == 2 else 5e-5)


def test_the_clamp_is_active_exactly_outside_its_range():
    assert logsnr(0.9937) == logsnr(1.0) and logsnr(0.9935) > logsnr(1.0)
    assert logsnr(0.00225) == logsnr(0.0) and logsnr(0.00227) < logsnr(0.0)


def test_the_network_sees_the_timestep_again_but_within_the_clamped_range():
    t = torch.linspace(0.01, 0.99, 50)

    torch.testing.assert_close(noise_level(logsnr_from_timestep(t)), t, atol=1e-5, rtol=0)
    ends = noise_level(logsnr_from_timestep(torch.tensor([0.0, 1.0])))
    assert ends.tolist() == pytest.approx([0.00226, 0.99358], abs=1e-5)


def test_timesteps_cover_the_range_with_a_pile_at_one():
    uniform = torch.tensor([0.0, 0.0005, 0.5, 0.9999999])

    assert timestep_from_uniform(uniform).tolist() == pytest.approx([1.0, 1.0, 0.501, 0.001], abs=1e-6)


def test_diffuse_mixes_with_unit_energy_and_targets_the_noise():
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(3, 16, 4, 6, generator=generator) for _ in range(2))
    t = torch.tensor([0.1, 0.5, 1.0])

    diffused = diffuse(latents, t, noise)

    a, b = signal_and_noise_scale(diffused.logsnr)
    torch.testing.assert_close(a**2 + b**2, torch.ones(3))
    assert a[2] == pytest.approx(0.01, rel=1e-4)
    torch.testing.assert_close(diffused.noised[1], a[1] * latents[1] + b[1] * noise[1])
    assert torch.equal(diffused.target, noise)
    assert torch.equal(diffused.r, noise_level(diffused.logsnr))
    with pytest.raises(ValueError, match="do not fit"):
        diffuse(latents, t[:1], noise)


def test_p2_weights_are_the_noise_energy_and_average_to_their_known_mean():
    t = timestep_from_uniform(torch.rand(100_000, generator=torch.Generator().manual_seed(0)))
    values = logsnr_from_timestep(t)

    weights = p2_weight(values)

    torch.testing.assert_close(weights, torch.sigmoid(-values))
    assert weights.mean().item() == pytest.approx(0.5055, abs=0.003)
    assert p2_weight(torch.zeros(1), shift=2.0).item() == pytest.approx(1 / 5)


def test_adaptive_buckets_reach_12_to_287():
    table = AdaptiveLossWeight()

    assert table.bucket(logsnr_from_timestep(torch.tensor([1.0, 0.0]))).tolist() == [12, 287]
    assert table.weight(torch.zeros(2)).tolist() == [1.0, 1.0]


def test_the_adaptive_update_equals_one_sample_after_the_other():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(200, generator=generator).round(decimals=1)  # many repeats
    losses = torch.rand(200, generator=generator)
    expected = AdaptiveLossWeight().state_dict()["losses"].tolist()
    for bucket, loss in zip(AdaptiveLossWeight().bucket(values).tolist(), losses.tolist(), strict=True):
        expected[bucket] = 0.99 * expected[bucket] + 0.01 * loss

    at_once, one_by_one = AdaptiveLossWeight(), AdaptiveLossWeight()
    at_once.update(values, losses)
    for index in range(200):
        one_by_one.update(values[index : index + 1], losses[index : index + 1])

    for table in (at_once, one_by_one):
        torch.testing.assert_close(
            table.state_dict()["losses"], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
        )
    assert at_once.weight(values[:1]).item() == pytest.approx(1 / expected[at_once.bucket(values[:1]).item()])


def test_the_adaptive_table_survives_a_save_and_refuses_poison():
    table = AdaptiveLossWeight()
    table.update(torch.tensor([0.0, 0.0, 3.0]), torch.tensor([0.1, 0.2, 0.3]))
    other = AdaptiveLossWeight()

    other.load_state_dict(table.state_dict())

    assert torch.equal(other.state_dict()["losses"], table.state_dict()["losses"])
    with pytest.raises(ValueError, match="not finite"):
        table.update(torch.zeros(1), torch.tensor([math.nan]))
    with pytest.raises(ValueError, match="300 finite numbers"):
        table.load_state_dict({"losses": torch.ones(3)})
    table.update(torch.empty(0), torch.empty(0))
    assert torch.equal(other.state_dict()["losses"], table.state_dict()["losses"])


def test_guidance_is_rescaled_per_sample_so_that_batching_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    conditional, unconditional = (torch.randn(2, 4, 3, 3, generator=generator) for _ in range(2))
    conditional[1] *= 10

    together = guide(conditional, unconditional, cfg=4.0, cfg_rho=0.7)

    for index in range(2):
        one = slice(index, index + 1)
        alone = guide(conditional[one], unconditional[one], cfg=4.0, cfg_rho=0.7)
        torch.testing.assert_close(together[one], alone)
        mixed = torch.lerp(unconditional[one], conditional[one], 4.0)
        expected = 0.7 * mixed * conditional[one].std() / mixed.std() + 0.3 * mixed
        torch.testing.assert_close(alone, expected)
    assert torch.equal(guide(conditional, unconditional, cfg=1.0, cfg_rho=0.0), conditional)


def test_sampling_with_a_perfect_predictor_returns_the_clean_latents():
    clean = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    levels: list[float] = []
    asked: list[int] = []

    def predict(x: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, None]:
        levels.append(r[0].item())
        a, b = signal_and_noise_scale(logsnr_from_timestep(r))
        return (x - a[:, None, None, None] * clean) / b[:, None, None, None], None

    def noise(step: int) -> torch.Tensor:
        asked.append(step)
        return torch.randn(clean.shape, generator=torch.Generator().manual_seed(step))

    result = sample(predict, noise, num_steps=20)

    torch.testing.assert_close(result, clean, atol=1e-2, rtol=0)
    assert asked == list(range(20))
    assert levels[0] == pytest.approx(0.99358, abs=1e-5) and levels == sorted(levels, reverse=True)


def test_sampling_pure_noise_keeps_unit_variance_on_the_way():
    # For data that is itself standard normal the best prediction is b * x, and every x stays standard normal.
    seen: list[float] = []

    def predict(x: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(x.std().item())
        _, b = signal_and_noise_scale(logsnr_from_timestep(r))
        return b[:, None, None, None] * x, b[:, None, None, None] * x

    def noise(step: int) -> torch.Tensor:
        return torch.randn(4, 16, 24, 24, generator=torch.Generator().manual_seed(step))

    sample(predict, noise, num_steps=200, shift=1.0)

    assert seen == pytest.approx([1.0] * 200, abs=0.05)


def test_ddim_goes_where_the_prediction_points_and_uses_no_noise_on_the_way():
    def predict(x: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, None]:
        return 0.5 * x, None

    def noise(seed: int) -> Callable[[int], torch.Tensor]:
        return lambda step: torch.randn(
            1, 16, 4, 4, generator=torch.Generator().manual_seed(seed if step else 0), dtype=torch.float64
        )

    one, other = (sample(predict, noise(seed), num_steps=10, eta=0.0) for seed in (1, 2))
    ancestral = sample(predict, noise(1), num_steps=10)

    assert torch.equal(one, other)
    assert not torch.allclose(one, ancestral)
