import pytest
import torch
from torch import nn

from training.optim.one_by_one import OneByOne, unwrapped
from training.optimizers import make_optimizer, set_rates


def make_module(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)).to(dtype)


def one_by_one(module, *, name="adamw", rate=1e-2, **options):
    parts = {"first": module[0].parameters(), "second": module[1].parameters()}
    inner = make_optimizer(name, parts, learning_rates={"first": rate, "second": rate / 2}, weight_decay=0.1)
    return OneByOne(inner, {parameter: key for key, parameter in module.named_parameters()}, **options)


def train(module, optimizer, steps=range(4)):
    for step in steps:
        inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        module(inputs.to(module[0].weight.dtype)).float().square().mean().backward()
        set_rates(optimizer, 1.0, global_step=step)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_one_by_one_gives_the_bits_of_all_at_once(name):
    whole, single = make_module(), make_module()
    single_optimizer = one_by_one(single, name=name)

    train(whole, unwrapped(one_by_one(whole, name=name)))
    train(single, single_optimizer)

    for parameter, expected in zip(single.parameters(), whole.parameters(), strict=True):
        assert torch.equal(parameter, expected)
        assert parameter.grad is None
    assert [len(group["params"]) for group in single_optimizer.param_groups] == [2, 2]
    assert len(single_optimizer.inner.param_groups) == 2


def test_small_updates_move_bf16_weights_unless_rounded_to_nearest():
    start = make_module(torch.bfloat16)[0].weight.detach().clone()
    moved = {}
    for rounding in ("nearest", "stochastic", "kahan"):
        module = make_module(torch.bfloat16)
        train(module, one_by_one(module, rate=3e-5, rounding=rounding), range(40))
        moved[rounding] = float((module[0].weight != start).float().mean())

    assert moved["nearest"] < 0.2
    assert min(moved["stochastic"], moved["kahan"]) > 0.5


def test_compensated_weights_follow_fp32_ones():
    fine, coarse, kahan = make_module(), make_module(torch.bfloat16), make_module(torch.bfloat16)
    fine.load_state_dict({key: tensor.float() for key, tensor in coarse.state_dict().items()})
    for module, rounding in ((fine, "nearest"), (coarse, "nearest"), (kahan, "kahan")):
        optimizer = one_by_one(module, rate=1e-4, rounding=rounding)
        for step in range(60):
            for number, parameter in enumerate(module.parameters()):
                generator = torch.Generator().manual_seed(100 * (step % 3) + number)
                parameter.grad = torch.randn(parameter.shape, generator=generator).add_(0.5).to(parameter.dtype)
            set_rates(optimizer, 1.0, global_step=step)
            optimizer.step()

    def distance(module):
        return (module[0].weight.detach().float() - fine[0].weight.detach()).abs().mean().item()

    assert distance(kahan) < distance(coarse) / 5


def test_rounding_by_chance_is_unbiased_and_counted_by_seed_step_and_name():
    def weights(seed, step):
        module = make_module(torch.bfloat16)
        train(module, one_by_one(module, rate=1e-5, rounding="stochastic", seed=seed), [step])
        return module[0].weight.detach()

    assert torch.equal(weights(0, 5), weights(0, 5))
    assert not torch.equal(weights(0, 5), weights(1, 5))


def test_rounding_by_chance_needs_to_know_the_step():
    module = make_module(torch.bfloat16)
    optimizer = one_by_one(module, rounding="stochastic")
    module(torch.ones(1, 16, dtype=torch.bfloat16)).sum().backward()

    with pytest.raises(RuntimeError, match="begin_step was not called"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scaled_gradients_are_unscaled_in_fp32(dtype):
    """A true gradient of 2e-8 is 0 in fp16; scaled by 65536 it is not, and must not become 0 on its way."""
    module = make_module(dtype)
    optimizer = one_by_one(module)
    optimizer.grad_scale = 65536.0
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 2e-8 * 65536)

    optimizer.step()

    moment = optimizer.state[module[0].weight]["exp_avg"]
    assert moment.dtype == torch.float32
    assert moment.flatten()[0].item() == pytest.approx(0.1 * 2e-8, rel=1e-3)
