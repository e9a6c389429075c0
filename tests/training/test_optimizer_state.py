import copy
import json

import pytest
import torch
from torch import nn

from training.optimizer_state import OptimizerStateError, load_optimizer_tensors, optimizer_tensors


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)).to(dtype)


def names_of(model):
    return {parameter: name for name, parameter in model.named_parameters()}


def train(model, optimizer, steps, *, start=0):
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(4, 6, generator=generator).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(inputs).float().square().mean().backward()
        optimizer.step()


def transformers_adafactor(parameters):
    from transformers.optimization import Adafactor

    return Adafactor(parameters, lr=1e-2, relative_step=False, scale_parameter=False)


class Eight(torch.optim.Optimizer):
    """Keeps what bitsandbytes keeps: uint8 moments, a shared map, block maxima, and a counter of Python's."""

    def __init__(self, parameters, lr=1e-2):
        super().__init__(parameters, {"lr": lr, "d": 1.0})
        self.map = torch.linspace(-1, 1, 256)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["d"] *= 1.5
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(step=0, state1=torch.zeros_like(parameter, dtype=torch.uint8), qmap1=self.map)
                state["step"] += 1
                state["absmax1"] = parameter.grad.abs().max().float()
                state["state1"] += (parameter.grad / state["absmax1"] * 20).abs().to(torch.uint8)
                parameter -= group["lr"] * group["d"] * state["qmap1"][state["state1"].long()].to(parameter.dtype)


OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
    "torch Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2),
    "transformers Adafactor": transformers_adafactor,
    "8 bit": Eight,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if "transformers" in name else ()) for name in OPTIMIZERS]
)
def test_training_goes_on_bit_for_bit(name, dtype):
    whole = make_model(dtype)
    whole_optimizer = OPTIMIZERS[name](whole.parameters())
    train(whole, whole_optimizer, 3)
    resumed = copy.deepcopy(whole)
    tensors, facts = optimizer_tensors(whole_optimizer, names_of(whole))
    facts = json.loads(json.dumps(facts, allow_nan=False))
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    train(whole, whole_optimizer, 3, start=3)

    optimizer = OPTIMIZERS[name](resumed.parameters())
    load_optimizer_tensors(optimizer, tensors, facts, names_of(resumed))
    train(resumed, optimizer, 3, start=3)

    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert optimizer.param_groups[0].keys() == whole_optimizer.param_groups[0].keys()


def test_fp32_moments_of_fp16_parameters_survive():
    model = make_model(torch.float16)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        tiny = torch.full(parameter.shape, 1e-12, dtype=torch.float32)
        optimizer.state[parameter] = {"step": torch.tensor(7.0), "exp_avg": tiny, "exp_avg_sq": tiny.clone()}
    tensors, facts = optimizer_tensors(optimizer, names_of(model))

    fresh = torch.optim.AdamW(model.parameters())
    load_optimizer_tensors(fresh, tensors, facts, names_of(model))

    slot = fresh.state[next(iter(model.parameters()))]["exp_avg_sq"]
    assert slot.dtype == torch.float32
    assert slot.flatten()[0] == torch.tensor(1e-12)


def test_the_order_of_parameters_does_not_matter():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 1)
    tensors, facts = optimizer_tensors(optimizer, names_of(model))

    other = torch.optim.AdamW(list(model.parameters())[::-1])
    load_optimizer_tensors(other, tensors, facts, names_of(model))

    for parameter, name in names_of(model).items():
        assert torch.equal(other.state[parameter]["exp_avg"], tensors[f"exp_avg/{name}"])


def test_a_parameter_that_never_had_a_gradient_has_no_slots():
    model = make_model()
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 1)
    tensors, facts = optimizer_tensors(optimizer, names_of(model))

    fresh = torch.optim.AdamW(model.parameters())
    load_optimizer_tensors(fresh, tensors, facts, names_of(model))

    assert "exp_avg/0.bias" not in tensors
    assert model[0].bias not in fresh.state


def test_the_learning_rate_stays_the_launchs_and_other_group_options_are_restored():
    model = make_model()
    optimizer = Eight(model.parameters(), lr=1.0)
    train(model, optimizer, 2)
    tensors, facts = optimizer_tensors(optimizer, names_of(model))

    fresh = Eight(model.parameters(), lr=0.5)
    load_optimizer_tensors(fresh, tensors, facts, names_of(model))

    assert (fresh.param_groups[0]["lr"], fresh.param_groups[0]["d"]) == (0.5, 2.25)


def test_options_that_are_not_finite_come_back_from_strict_json():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    optimizer.param_groups[0].update(growth_rate=float("inf"), bounds=(0.5, float("-inf")), peak_rate=1.0)
    _, facts = optimizer_tensors(optimizer, names_of(model))

    fresh = torch.optim.SGD(model.parameters(), lr=1e-2)
    fresh.param_groups[0]["peak_rate"] = 3.0
    load_optimizer_tensors(fresh, {}, json.loads(json.dumps(facts, allow_nan=False)), names_of(model))

    group = fresh.param_groups[0]
    assert (group["growth_rate"], group["bounds"], group["peak_rate"]) == (float("inf"), (0.5, float("-inf")), 3.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, facts: tensors.pop("exp_avg/0.weight"), r"slots missing: exp_avg/0\.weight"),
        (lambda tensors, facts: tensors.update({"ghost/0.weight": torch.ones(1)}), "too many: ghost"),
        (lambda tensors, facts: facts.update(optimizer="Lion"), "from Lion, this is AdamW"),
        (lambda tensors, facts: facts["groups"][0]["parameters"].remove("0.bias"), r"new: 0\.bias"),
        (lambda tensors, facts: facts["slots"]["0.bias"].update(shape=[9]), r"0\.bias: shape \[5\]"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change, message):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 1)
    tensors, facts = optimizer_tensors(optimizer, names_of(model))
    change(tensors, facts)
    fresh = torch.optim.AdamW(model.parameters())

    with pytest.raises(OptimizerStateError, match=message):
        load_optimizer_tensors(fresh, tensors, facts, names_of(model))

    assert not fresh.state


def test_a_parameter_without_a_name_is_refused():
    model = make_model()
    optimizer = torch.optim.AdamW([*model.parameters(), nn.Parameter(torch.ones(2))])

    with pytest.raises(OptimizerStateError, match="has no name"):
        optimizer_tensors(optimizer, names_of(model))
