import math

import pytest
import torch

from training.schedules import parse_rules, rate_factor


def factors(name, *, warmup=0, total=None, steps=range(13), **shape):
    return [rate_factor(name, global_step=step, warmup_steps=warmup, total_steps=total, **shape) for step in steps]


def test_a_constant_rate_ignores_the_warm_up():
    assert factors("constant", warmup=4) == [1.0] * 13


def test_a_warm_up_rises_from_the_first_step_on_and_reaches_the_peak():
    assert factors("constant_with_warmup", warmup=4)[:6] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_falls_to_zero_at_the_horizon_and_stays_there():
    assert factors("linear", warmup=2, total=10) == [0.5, 1.0, *(1 - k / 8 for k in range(9)), 0.0, 0.0]


def test_a_shape_ends_at_its_end_fraction():
    assert factors("cosine", total=8, end_fraction=0.1, steps=[0, 4, 8, 99]) == pytest.approx([1, 0.55, 0.1, 0.1])


SHAPES = {
    "constant": ({}, {}),
    "constant_with_warmup": ({}, {"num_warmup_steps": 7}),
    "linear": ({}, {"num_warmup_steps": 7, "num_training_steps": 50}),
    "cosine": ({}, {"num_warmup_steps": 7, "num_training_steps": 50}),
    "cosine_with_restarts": ({"restarts": 3}, {"num_warmup_steps": 7, "num_training_steps": 50, "num_cycles": 3}),
    "polynomial": (
        {"power": 2.5, "end_fraction": 1e-7 / 0.02},
        {"num_warmup_steps": 7, "num_training_steps": 50, "power": 2.5},
    ),
    "piecewise_constant": ({"rules": "1:10,0.1:20,0.005"}, {"step_rules": "1:10,0.1:20,0.005"}),
}


@pytest.mark.slow  # importing diffusers takes seconds
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_that_of_diffusers_and_its_warm_up_one_step_ahead(name):
    optimization = pytest.importorskip("diffusers.optimization")
    ours, theirs = SHAPES[name]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.02)
    scheduler = optimization.get_scheduler(name, optimizer, **theirs)
    expected = []
    for _ in range(60):
        expected.append(scheduler.get_last_lr()[0] / 0.02)
        optimizer.step()
        scheduler.step()
    warmup = theirs.get("num_warmup_steps", 0)

    found = factors(name, warmup=7, total=50, steps=range(60), **ours)

    assert found[:warmup] == pytest.approx(expected[1 : warmup + 1])
    end = 51 if name == "cosine" else 60  # theirs rises again behind the horizon
    assert found[warmup:end] == pytest.approx(expected[warmup:end], abs=1e-12)
    assert found[51:] == [found[50]] * 9


def test_no_step_has_rate_zero_before_the_horizon():
    for name, (shape, _) in SHAPES.items():
        assert all(factor > 0 for factor in factors(name, warmup=7, total=50, steps=range(50), **shape)), name


def test_a_falling_schedule_needs_its_horizon():
    with pytest.raises(ValueError, match="'linear' needs total_steps"):
        rate_factor("linear", global_step=0, warmup_steps=0, total_steps=None)


def test_an_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="'stairs' is not one of"):
        rate_factor("stairs", global_step=0, warmup_steps=0, total_steps=None)


@pytest.mark.parametrize("rules", ["", "1:10", "1:x,2", "0.5:20,0.1:10,1", "-1:5,1", f"1:5,{math.nan}"])
def test_rules_that_cannot_be_read_are_shown(rules):
    with pytest.raises(ValueError, match="rules"):
        parse_rules(rules)
