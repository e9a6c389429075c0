"""Timesteps, noise and weights of the settings against closed forms and against each other."""

import math

import numpy as np
import pytest
import torch

from sharding.config import ConfigError
from tests.training.toy import toy_config
from training.randomness import SampleIdentity, normal
from training.stage_c.gdf import logsnr_from_timestep, min_snr_weight, p2_weight
from training.stage_c.objective import Objective

IDENTITIES = [SampleIdentity(seed=3, epoch=0, chunk="c", key=f"{number:05d}") for number in range(2000)]
LOGSNR = torch.linspace(-9, 9, 37)


def objective(**stage_c):
    return Objective(toy_config(stage_c=stage_c).stage_c)


def diffused(**stage_c):
    return objective(**stage_c).diffuse(torch.zeros(8, 16, 3, 4), torch.full((8,), 0.5), IDENTITIES[:8])


def test_timesteps_fill_the_range_that_is_trained_and_no_other():
    everything, part = objective().timesteps(IDENTITIES), objective(timestep_range=[0.25, 0.75]).timesteps(IDENTITIES)

    assert (everything.min(), everything.max()) == pytest.approx((0.001, 1), abs=2e-3)
    assert part.min() >= 0.25 and part.max() <= 0.75 and part.std() == pytest.approx(0.5 / 12**0.5, rel=0.05)
    torch.testing.assert_close(part, 0.25 + everything / 2)  # the same sample is as far along
    assert torch.equal(everything[5:9], objective().timesteps(IDENTITIES[5:9]))


def test_p2_is_one_over_one_plus_snr_and_averages_to_its_known_mean():
    weights = objective().weights(LOGSNR)
    trained = objective().weights(logsnr_from_timestep(objective().timesteps(IDENTITIES)))

    torch.testing.assert_close(weights, 1 / (1 + LOGSNR.exp()))
    assert trained.mean() == pytest.approx(0.5055, abs=0.02)


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_of_a_predicted_noise_is_one_up_to_gamma_and_falls_with_the_snr(gamma):
    weights = objective(loss_weighting="min_snr", min_snr_gamma=gamma).weights(LOGSNR)

    by_hand = [min(math.exp(value), gamma) / math.exp(value) for value in LOGSNR.tolist()]
    torch.testing.assert_close(weights, torch.tensor(by_hand))
    # Squared errors of the picture are those of the noise / SNR: this is min(SNR, gamma) on them.
    torch.testing.assert_close(weights * LOGSNR.exp(), LOGSNR.exp().clamp(max=gamma))
    assert (weights[math.log(gamma) > LOGSNR] == 1).all() and weights[-1] < 0.01


def test_none_counts_all_noise_levels_the_same():
    assert objective(loss_weighting="none").weights(LOGSNR).tolist() == [1.0] * len(LOGSNR)


def test_loss_shift_moves_what_the_weight_sees_and_nothing_else():
    moved = LOGSNR + 2 * math.log(2)

    torch.testing.assert_close(objective(loss_shift=2.0).weights(LOGSNR), p2_weight(moved))
    torch.testing.assert_close(
        objective(loss_weighting="min_snr", loss_shift=2.0).weights(LOGSNR), min_snr_weight(moved)
    )
    assert torch.equal(diffused(loss_shift=2.0).noised, diffused().noised)


def test_shift_trains_more_noise_at_the_same_timestep_and_tells_the_network():
    plain, shifted = diffused(), diffused(shift=2.0)

    torch.testing.assert_close(shifted.logsnr, plain.logsnr - 2 * math.log(2))
    assert (shifted.r > plain.r).all()
    assert torch.equal(shifted.target, plain.target)
    assert shifted.noised.std() > plain.noised.std()  # the picture is zeros here


def test_offset_noise_is_one_number_per_channel_in_noise_and_target():
    plain, offset = diffused(), diffused(offset_noise=0.1)

    by_hand = np.stack([normal(identity, "offset noise", (16, 1, 1)) for identity in IDENTITIES[:8]])
    added = offset.target - plain.target
    torch.testing.assert_close(added, 0.1 * torch.from_numpy(by_hand).expand(8, 16, 3, 4), atol=1e-6, rtol=0)
    assert added[:, :, 0, 0].std() == pytest.approx(0.1, rel=0.25)
    b = torch.sigmoid(-plain.logsnr).sqrt()[:, None, None, None]
    torch.testing.assert_close(offset.noised - plain.noised, b * added, atol=1e-6, rtol=0)


def test_the_adaptive_table_is_moved_once_a_step_in_the_plans_order_and_is_state():
    table, other = objective(loss_weighting="adaptive"), objective(loss_weighting="adaptive")
    logsnr, losses = [0.02, 0.03, 3.0, 0.05], [0.5, 0.1, 0.3, 0.9]  # three of one bucket

    table.after_step(logsnr, losses)
    table.after_step([], [])
    other.load_state_dict(table.state_dict())

    expected = 0.99**3 * 1 + 0.01 * (0.99**2 * 0.5 + 0.99 * 0.1 + 0.9)
    assert table.weights(torch.tensor([0.04])).item() == pytest.approx(1 / expected, rel=1e-6)
    assert table.weights(torch.tensor([3.0])).item() == pytest.approx(1 / (0.99 + 0.003), rel=1e-6)
    assert torch.equal(other.weights(LOGSNR), table.weights(LOGSNR))
    assert objective().state_dict() == {} and list(table.state_dict()) == ["losses"]


@pytest.mark.parametrize(
    ("stage_c", "message"),
    [
        ({"timestep_range": [0.5, 0.5]}, r"timestep_range \[0.5, 0.5\]: the first must be smaller"),
        ({"min_snr_gamma": 3.0}, "min_snr_gamma 3 means nothing with loss_weighting 'p2', only with min_snr"),
        (
            {"loss_shift": 2.0, "loss_weighting": "adaptive"},
            "loss_shift 2 means nothing with loss_weighting 'adaptive'",
        ),
        ({"image_embedding_fraction": 0.1}, "is 0.1 and image_encoder is None: set both, or neither"),
        ({"image_encoder": "clip"}, "is 0 and image_encoder is 'clip'"),
    ],
)
def test_an_option_that_nothing_reads_is_refused(stage_c, message):
    with pytest.raises((ValueError, ConfigError), match=message):
        toy_config(stage_c=stage_c)
