import math

import pytest
import torch
from torch import nn

from training.optimizers import make_optimizer, rate_factor, set_rates


def factors(name, *, warmup=0, total=None, steps=range(13)):
    return [rate_factor(name, global_step=step, warmup_steps=warmup, total_steps=total) for step in steps]


def test_a_constant_rate_ignores_the_warm_up():
    assert factors("constant", warmup=4) == [1.0] * 13


def test_a_warm_up_rises_from_the_first_step_on_and_reaches_the_peak():
    assert factors("constant_with_warmup", warmup=4)[:6] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_falls_to_zero_at_the_horizon_and_stays_there():
    assert factors("linear", warmup=2, total=10) == [0.5, 1.0, *(1 - k / 8 for k in range(9)), 0.0, 0.0]


def test_cosine_is_half_way_in_the_middle_and_zero_at_the_end():
    values = factors("cosine", total=12)

    assert values[0] == 1.0
    assert values[6] == pytest.approx(0.5)
    assert values[3] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert values[12] == pytest.approx(0.0, abs=1e-12)
    assert factors("cosine", total=12, steps=[500]) == pytest.approx([0.0], abs=1e-12)


def test_a_falling_schedule_needs_its_horizon():
    with pytest.raises(ValueError, match="'linear' needs total_steps"):
        rate_factor("linear", global_step=0, warmup_steps=0, total_steps=None)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_each_part_has_its_own_rate_times_the_schedule(name):
    parts = {"network": nn.Linear(2, 2).parameters(), "text_encoder": nn.Linear(2, 2).parameters()}
    rates = {"network": 1e-3, "text_encoder": 1e-5}
    optimizer = make_optimizer(name, parts, learning_rates=rates, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

    now = set_rates(optimizer, 0.5)

    assert now == {"network": 5e-4, "text_encoder": 5e-6}
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4, 5e-6]


def test_frozen_parameters_are_in_no_group():
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)

    optimizer = make_optimizer(
        "adamw", {"network": module.parameters()}, learning_rates={"network": 1.0}, betas=(0.9, 0.999), eps=1e-8,
        weight_decay=0.0,
    )  # fmt: skip

    assert [len(group["params"]) for group in optimizer.param_groups] == [1]


def test_adafactor_moves_by_the_rate_it_is_given():
    parameter = nn.Parameter(torch.zeros(4, 4))
    optimizer = make_optimizer(
        "adafactor", {"network": [parameter]}, learning_rates={"network": 0.01}, betas=(0.9, 0.999), eps=1e-8,
        weight_decay=0.0,
    )  # fmt: skip
    parameter.grad = torch.ones(4, 4)

    optimizer.step()

    assert parameter.detach() == pytest.approx(torch.full((4, 4), -0.01), rel=1e-3)  # clip threshold 1, no scaling


def test_an_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match="'sgd' is not one of adamw, adafactor"):
        make_optimizer(
            "sgd", {"network": nn.Linear(1, 1).parameters()}, learning_rates={"network": 1.0}, betas=(0.9, 0.999),
            eps=1e-8, weight_decay=0.0,
        )  # fmt: skip
