"""SD's noise schedule, targets and weights against diffusers' own, and noise that is counted."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from training.config.dreambooth import NUM_TIMESTEPS
from training.dreambooth.diffusion.schedule import NoiseSchedule, timestep
from training.dreambooth.diffusion.shaping import noise_of, perturbed
from training.dreambooth.diffusion.weights import differences, huber_c, loss_weights
from training.randomness import SampleIdentity

T = torch.tensor([0, 1, 100, 500, 998, 999])
HER = SampleIdentity(0, 0, "concepts/0000", "00ff", "her")


def theirs(*, zero=False):
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=zero,
        prediction_type="v_prediction",
    )  # fmt: skip


@pytest.mark.parametrize("zero", [False, True])
def test_the_schedule_noises_and_asks_as_diffusers_does(zero):
    ours, scheduler = NoiseSchedule.make(zero_terminal_snr=zero), theirs(zero=zero)
    latents, noise = torch.randn(2, len(T), 4, 8, 8)

    assert torch.allclose(ours.alphas_cumprod, scheduler.alphas_cumprod, rtol=1e-4, atol=2e-7)
    assert torch.allclose(ours.noised(latents, noise, T), scheduler.add_noise(latents, noise, T), atol=1e-3)
    asked = ours.target("v_prediction", latents, noise, T)
    assert torch.allclose(asked, scheduler.get_velocity(latents, noise, T), atol=1e-3)
    assert ours.target("epsilon", latents, noise, T) is noise
    assert (float(ours.snr(torch.tensor([999]))) == 0) is zero


def test_snr_is_that_of_the_literature_and_of_diffusers():
    schedule = NoiseSchedule.make()
    steps = torch.tensor([0, 100, 200, 500, 999])

    assert schedule.snr(steps).tolist() == pytest.approx([1175, 8.45, 3.06, 0.382, 0.00468], rel=5e-3)
    assert torch.allclose(schedule.snr(steps), compute_snr(theirs(), steps), rtol=1e-3)


@pytest.mark.parametrize(("step", "epsilon", "v"), [(50, 0.254, 0.242), (500, 1.0, 0.276), (999, 1.0, 0.0047)])
def test_min_snr_is_right_for_both_kinds_of_prediction(step, epsilon, v):
    snr = NoiseSchedule.make().snr(torch.tensor([step]))

    assert float(loss_weights("min_snr", snr, "epsilon", gamma=5)) == pytest.approx(epsilon, rel=0.01)
    assert float(loss_weights("min_snr", snr, "v_prediction", gamma=5)) == pytest.approx(v, rel=0.01)


def test_the_other_weights_follow_their_formulas():
    snr = torch.tensor([0.5, 4.0, 2000.0])

    assert loss_weights("debiased", snr, "epsilon", gamma=5).tolist() == pytest.approx([2**0.5, 0.5, 1000**-0.5])
    assert loss_weights("debiased", snr, "v_prediction", gamma=5).tolist() == pytest.approx([2 / 3, 0.2, 1 / 2001])
    assert loss_weights("p2", snr, "epsilon", gamma=2).tolist() == pytest.approx([4 / 9, 0.04, 2001**-2])
    assert loss_weights("none", snr, "epsilon", gamma=5).tolist() == [1, 1, 1]


def test_huber_is_a_square_near_zero_and_a_line_far_away():
    target, c = torch.zeros(2, 1, 1, 2), torch.tensor([0.1, 0.1])
    predicted = torch.tensor([1e-4, 100.0]).expand(2, 1, 1, 2)

    near, far = differences("huber", predicted, target, huber_c=c)[0].flatten().tolist()

    assert near == pytest.approx(1e-8, rel=0.05) and far == pytest.approx(2 * 0.1 * 100, rel=0.01)
    assert float(differences("l2", predicted, target)[0, 0, 0, 1]) == 10_000
    smooth = differences("smooth_l1", predicted, target, huber_c=c)
    assert torch.allclose(smooth * 0.1, differences("huber", predicted, target, huber_c=c))
    t, snr = torch.tensor([0, 1000]), torch.tensor([1e6, 1e-6])
    assert huber_c("exponential", t, snr, smallest=0.1, num_timesteps=1000).tolist() == pytest.approx([1, 0.1])
    assert huber_c("snr", t, snr, smallest=0.1, num_timesteps=1000).tolist() == pytest.approx([1, 0.1], rel=0.01)
    assert huber_c("constant", t, snr, smallest=0.1, num_timesteps=1000).tolist() == pytest.approx([0.1, 0.1])


def test_timesteps_cover_their_range_evenly():
    numbers = torch.arange(20_000) / 20_000

    assert sorted({timestep(float(number)) for number in numbers}) == list(range(NUM_TIMESTEPS))
    assert {timestep(float(number), low=0.2, high=0.3) for number in numbers} == set(range(200, 300))


def test_noise_is_counted_and_each_shape_of_it_differs():
    shape = (4, 32, 32)
    plain = noise_of(HER, shape)
    offset = noise_of(HER, shape, offset=0.5)
    coarse = noise_of(HER, shape, multires_iterations=6, multires_discount=0.5)

    assert torch.equal(plain, noise_of(HER, shape))
    assert torch.allclose((offset - plain).std(dim=(1, 2)), torch.zeros(4), atol=1e-5)
    assert float((offset - plain).abs().max()) > 0.05
    assert float(coarse.std()) == pytest.approx(1, abs=1e-4)
    assert float(coarse.mean(dim=(1, 2)).abs().mean()) > 2 * float(plain.mean(dim=(1, 2)).abs().mean())
    assert torch.equal(perturbed(HER, plain, strength=0), plain)
    assert float((perturbed(HER, plain, strength=0.1) - plain).std()) == pytest.approx(0.1, rel=0.1)
