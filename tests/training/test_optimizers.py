import importlib
import json

import pytest
import torch
from torch import nn

from training.optim.averaged import schedule_free_average
from training.optim.one_by_one import OneByOne
from training.optimizer_state import load_optimizer_tensors, optimizer_tensors
from training.optimizers import NAMES, MissingPackageError, make_optimizer, set_rates

NEEDS = {
    "adam8bit": "bitsandbytes", "adamw8bit": "bitsandbytes", "lion8bit": "bitsandbytes", "prodigy": "prodigyopt",
    "schedule_free": "schedulefree", "adafactor": "transformers",
}  # fmt: skip
ONE_BY_ONE = [name for name in NAMES if name not in ("prodigy", "schedule_free")]


def require(name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])


def marked(names):
    return [pytest.param(name, marks=pytest.mark.slow if name in NEEDS else ()) for name in names]


def make_module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(80, 64), nn.LayerNorm(64), nn.Linear(64, 3))  # one of them large enough for 8 bits


def optimizer_of(name, module, *, rate=1e-2, weight_decay=0.1, rounding=None):
    exempt = {parameter for parameter in module.parameters() if parameter.dim() == 1}
    rate = 1.0 if name == "prodigy" else rate
    optimizer = make_optimizer(
        name, {"first": module[0].parameters(), "rest": module[1:].parameters()},
        learning_rates={"first": rate, "rest": rate}, weight_decay=weight_decay, undecayed=exempt,
    )  # fmt: skip
    return optimizer if rounding is None else OneByOne(optimizer, names_of(module), seed=4, rounding=rounding)


def names_of(module):
    return {parameter: name for name, parameter in module.named_parameters()}


def backward(module, step):
    inputs = torch.randn(4, 80, generator=torch.Generator().manual_seed(step))
    dtype = next(module.parameters()).dtype
    (module(inputs.to(dtype)).float() - inputs[:, :3]).square().mean().backward()


def train(module, optimizer, steps):
    for step in steps:
        backward(module, step)
        set_rates(optimizer, 1.0 / (1 + step), global_step=step)
        optimizer.step()
        optimizer.zero_grad()


def saved_of(optimizer, module):
    tensors, facts = optimizer_tensors(optimizer, names_of(module))
    return {key: tensor.clone() for key, tensor in tensors.items()}, json.loads(json.dumps(facts, allow_nan=False))


def goes_on_bit_for_bit(name, *, dtype=torch.float32, rounding=None):
    whole = make_module().to(dtype)
    optimizer = optimizer_of(name, whole, rounding=rounding)
    train(whole, optimizer, range(3))
    resumed = make_module().to(dtype)
    resumed.load_state_dict({key: tensor.clone() for key, tensor in whole.state_dict().items()})
    tensors, facts = saved_of(optimizer, whole)
    train(whole, optimizer, range(3, 7))

    other = optimizer_of(name, resumed, rounding=rounding)
    load_optimizer_tensors(other, tensors, facts, names_of(resumed))
    train(resumed, other, range(3, 7))

    for parameter, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(parameter, expected)
    ends, expected_ends = saved_of(other, resumed), saved_of(optimizer, whole)
    assert ends[1] == expected_ends[1]
    assert ends[0].keys() == expected_ends[0].keys()
    assert all(torch.equal(tensor, expected_ends[0][key]) for key, tensor in ends[0].items())
    return expected_ends[0]


@pytest.mark.parametrize("name", marked(NAMES))
def test_every_optimizer_learns_and_goes_on_bit_for_bit_from_a_saved_state(name):
    require(name)

    slots = goes_on_bit_for_bit(name)

    module = make_module()
    optimizer = optimizer_of(name, module)
    inputs = torch.randn(64, 80, generator=torch.Generator().manual_seed(9))

    def loss():
        return float((module(inputs) - inputs[:, :3]).square().mean().detach())

    before = loss()
    for _ in range(30):
        (module(inputs) - inputs[:, :3]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss() < 0.9 * before
    assert ("uint8" in {str(tensor.dtype).removeprefix("torch.") for tensor in slots.values()}) == ("8bit" in name)


@pytest.mark.parametrize("name", marked(ONE_BY_ONE))
@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_bf16_weights_have_fp32_state_and_go_on_bit_for_bit(name, rounding):
    require(name)

    slots = goes_on_bit_for_bit(name, dtype=torch.bfloat16, rounding=rounding)

    low = {key for key, tensor in slots.items() if tensor.dtype == torch.bfloat16}
    assert low == (
        {f"kahan_lost/{name}" for name, _ in make_module().named_parameters()} if rounding == "kahan" else set()
    )


@pytest.mark.parametrize("name", marked(NAMES))
def test_decay_is_for_matrices_only_and_decoupled(name):
    require(name)
    module = make_module()
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    optimizer = optimizer_of(name, module)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)

    optimizer.step()

    changed = [key for key, tensor in module.state_dict().items() if not torch.equal(tensor, before[key])]
    # Prodigy makes no step without a gradient
    assert changed == ([] if name == "prodigy" else ["0.weight", "2.weight"])
    if changed:
        torch.testing.assert_close(module[0].weight.detach(), before["0.weight"] * (1 - 1e-2 * 0.1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", marked(["adamw", "adafactor", "lion"]))
def test_each_part_has_its_own_rate_times_the_schedule(name):
    parts = {"network": nn.Linear(2, 2).parameters(), "text_encoder": nn.Linear(2, 2).parameters()}
    optimizer = make_optimizer(name, parts, learning_rates={"network": 1e-3, "text_encoder": 1e-5})

    now = set_rates(optimizer, 0.5)

    assert now == {"network": 5e-4, "text_encoder": 5e-6}
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4, 5e-6]


def test_frozen_parameters_are_in_no_group_and_something_must_be_left():
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)

    optimizer = make_optimizer("adamw", {"network": module.parameters()}, learning_rates={"network": 1.0})

    assert [len(group["params"]) for group in optimizer.param_groups] == [1]
    module.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing is trained"):
        make_optimizer("adamw", {"network": module.parameters()}, learning_rates={"network": 1.0})


@pytest.mark.slow
def test_adafactor_moves_by_the_rate_it_is_given_and_no_further_than_its_threshold():
    for threshold, distance in ((1.0, 0.01), (0.25, 0.0025)):
        parameter = nn.Parameter(torch.zeros(4, 4))
        optimizer = make_optimizer(
            "adafactor", {"network": [parameter]}, learning_rates={"network": 0.01}, adafactor_clip_threshold=threshold
        )
        parameter.grad = torch.ones(4, 4)

        optimizer.step()

        assert parameter.detach() == pytest.approx(torch.full((4, 4), -distance), rel=1e-3)
        (group,) = optimizer.param_groups
        assert (group["eps"][0], group["scale_parameter"], group["relative_step"]) == (1e-30, False, False)


def test_lion_steps_by_the_sign_of_its_momentum():
    parameter = nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
    optimizer = make_optimizer("lion", {"a": [parameter]}, learning_rates={"a": 0.1}, weight_decay=0.5)
    momentum, value = torch.zeros(3), torch.ones(3)

    for gradient in (torch.tensor([1.0, -2.0, 0.0]), torch.tensor([-30.0, 0.1, 0.0])):
        parameter.grad = gradient.clone()
        optimizer.step()
        value = value * (1 - 0.1 * 0.5) - 0.1 * torch.sign(0.9 * momentum + 0.1 * gradient)
        momentum = 0.99 * momentum + 0.01 * gradient

    torch.testing.assert_close(parameter.detach(), value)
    torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], momentum)


@pytest.mark.slow
def test_lion_is_that_of_bitsandbytes():
    library = pytest.importorskip("bitsandbytes")
    ours, theirs = make_module(), make_module()
    one = make_optimizer("lion", {"a": ours.parameters()}, learning_rates={"a": 1e-3}, weight_decay=0.1)
    other = library.optim.Lion(theirs.parameters(), lr=1e-3, weight_decay=0.1)

    for step in range(10):
        for module, optimizer in ((ours, one), (theirs, other)):
            backward(module, step)
            optimizer.step()
            optimizer.zero_grad()

    for parameter, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_schedule_free_shows_its_average_and_goes_on_as_if_nobody_had_looked():
    require("schedule_free")
    looked, alone = make_module(), make_module()
    one, other = optimizer_of("schedule_free", looked), optimizer_of("schedule_free", alone)
    for step in range(5):
        train(looked, one, [step])
        train(alone, other, [step])
        trained = looked[0].weight.detach().clone()
        with pytest.raises(KeyError), schedule_free_average(one):
            average, z = looked[0].weight.detach().clone(), one.state[looked[0].weight]["z"]
            raise KeyError  # a preview may fail
        torch.testing.assert_close(trained, torch.lerp(average, z, 0.1), rtol=1e-5, atol=1e-6)  # y = 0.9 x + 0.1 z

    assert step == 4 and not torch.equal(average, trained)
    for parameter, expected in zip(looked.parameters(), alone.parameters(), strict=True):
        assert torch.equal(parameter, expected)


@pytest.mark.parametrize("name, package, extra", [
    ("adamw8bit", "bitsandbytes", "gpu"), ("prodigy", "prodigyopt", "optimizers"),
    ("schedule_free", "schedulefree", "optimizers"),
])  # fmt: skip
def test_a_missing_package_names_its_extra(monkeypatch, name, package, extra):
    real = importlib.import_module

    def without(wanted, *rest):
        if wanted == package:
            raise ModuleNotFoundError(f"No module named '{package}'")
        return real(wanted, *rest)

    monkeypatch.setattr(importlib, "import_module", without)

    with pytest.raises(MissingPackageError, match=rf"{package} is not installed .*'\.\[{extra}\]'"):
        make_optimizer(name, {"a": nn.Linear(1, 1).parameters()}, learning_rates={"a": 1.0})


def test_a_bitsandbytes_without_a_cpu_path_is_named(monkeypatch):
    class Library:
        __version__ = "0.45.0"

        class optim:
            class AdamW8bit:
                def __init__(self, parameters):
                    pass

                def step(self):
                    raise NotImplementedError("no kernel")

    monkeypatch.setattr(importlib, "import_module", lambda name: Library)

    with pytest.raises(
        MissingPackageError, match=r"bitsandbytes 0\.45\.0 has no 8-bit optimizers for the CPU \(no kernel"
    ):
        make_optimizer("adam8bit", {"a": nn.Linear(1, 1).parameters()}, learning_rates={"a": 1.0})


def test_an_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match="'sgd' is not one of adamw, adafactor, lion"):
        make_optimizer("sgd", {"network": nn.Linear(1, 1).parameters()}, learning_rates={"network": 1.0})
