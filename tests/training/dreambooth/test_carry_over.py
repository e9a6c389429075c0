"""What the optimizer keeps from one stage to the next."""

import pytest
import torch
from torch import nn

from tests.training.dreambooth.toy_recipe import sd_config
from training.carry_over import OptimizerState, carried_over, carry_over_to
from training.optimizer_state import OptimizerStateError, load_optimizer_tensors, optimizer_tensors
from training.optimizers import make_optimizer
from training.tensor_file import shapes_of

STAGES = [
    {"name": "a", "epochs": 1},
    {"name": "b", "epochs": 1},
    {"name": "c", "epochs": 1, "optimizer": "fresh"},
]


def networks():
    torch.manual_seed(0)
    return nn.ModuleDict({"unet": nn.Linear(3, 3), "text": nn.Linear(3, 3)})


def optimizer_for(module, *parts, name="adamw"):
    for part, layer in module.items():
        layer.requires_grad_(part in parts)
    return make_optimizer(
        name, {part: module[part].parameters() for part in parts}, learning_rates=dict.fromkeys(parts, 0.1),
        betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0,
    )  # fmt: skip


def names_of(module):
    return {parameter: name for name, parameter in module.named_parameters()}


def trained(module, *parts, steps=3, name="adamw", optimizer=None):
    optimizer = optimizer or optimizer_for(module, *parts, name=name)
    for step in range(steps):
        optimizer.zero_grad()
        inputs = torch.full((2, 3), 1.0 + step)
        module["unet"](module["text"](inputs)).square().sum().backward()
        optimizer.step()
    return optimizer


def state_of(optimizer, module):
    return OptimizerState(*optimizer_tensors(optimizer, names_of(module)))


def load(optimizer, module, state, *, is_fresh=False):
    _, own = optimizer_tensors(optimizer, names_of(module))
    made = carried_over(state, own, is_fresh=is_fresh)
    load_optimizer_tensors(optimizer, made.tensors, made.facts, names_of(module))
    return dict(optimizer_tensors(optimizer, names_of(module))[0].items())


def test_moments_of_what_both_stages_train_go_on_and_others_start_or_go():
    module = networks()
    state = state_of(trained(module, "unet", "text"), module)
    saved = dict(state.tensors.items())

    found = load(optimizer_for(module, "unet"), module, state)

    assert {name.split("/")[1].split(".")[0] for name in found} == {"unet"}
    assert found and all(torch.equal(tensor, saved[name]) for name, tensor in found.items())
    only_unet = state_of(trained(module, "unet"), module)
    back = optimizer_for(module, "unet", "text")  # a part that rested comes back
    again = load(back, module, only_unet)
    assert {name.split("/")[1].split(".")[0] for name in again} == {"unet"}
    trained(module, "unet", "text", steps=1, optimizer=back)
    steps = {
        names_of(module)[parameter]: int(back.state[parameter]["step"])
        for group in back.param_groups
        for parameter in group["params"]
    }
    assert steps == {"unet.weight": 4, "unet.bias": 4, "text.weight": 1, "text.bias": 1}


def test_a_fresh_optimizer_forgets_all_moments():
    module = networks()
    state = state_of(trained(module, "unet", "text"), module)

    assert load(optimizer_for(module, "unet", "text"), module, state, is_fresh=True) == {}
    other = state_of(trained(module, "unet", name="lion"), module)
    assert load(optimizer_for(module, "unet"), module, other, is_fresh=True) == {}


def test_a_state_of_another_optimizer_is_refused_unless_fresh():
    module = networks()
    state = state_of(trained(module, "unet", name="lion"), module)

    with pytest.raises(OptimizerStateError, match='set the stage\'s optimizer = "fresh"'):
        load(optimizer_for(module, "unet"), module, state)


def test_shapes_are_told_without_reading():
    module = networks()
    state = state_of(trained(module, "unet", "text"), module)
    _, own = optimizer_tensors(optimizer_for(module, "text"), names_of(module))

    made = carried_over(state, own, is_fresh=False)

    assert shapes_of(made.tensors) == {name: tuple(one.shape) for name, one in made.tensors.items()}
    assert len(shapes_of(made.tensors)) > 2


@pytest.mark.parametrize(
    ("chunk", "before", "expected"),
    [
        ("concepts/01-a", "concepts/01-a", "all"),
        ("concepts/02-b", "concepts/01-a", "keep"),
        ("concepts/03-c", "concepts/02-b", "fresh"),
        ("concepts/03-c", "concepts/03-c", "all"),
        ("concepts/01-a", "combined/0000", "all"),
        ("combined/0000", "concepts/01-a", "all"),
    ],
)
def test_only_where_a_stage_begins_is_anything_left_behind(chunk, before, expected):
    config = sd_config("none", concepts="c.toml", stages=STAGES)

    assert carry_over_to(config, chunk, state_of=before) == expected
