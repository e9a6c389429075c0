import logging
import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from training.engines.fused import FusedEngine
from training.engines.plain import PlainEngine
from training.errors import NonFiniteError
from training.optim.one_by_one import OneByOne
from training.optimizers import make_optimizer, set_rates


def make_module(dtype=torch.float32, depth=6):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(depth))).to(dtype)


def engine_of(kind, module, *, name="adamw", rounding="nearest"):
    inner = make_optimizer(name, {"all": module.parameters()}, learning_rates={"all": 1e-2}, weight_decay=0.1)
    one_by_one = OneByOne(inner, {parameter: key for key, parameter in module.named_parameters()}, rounding=rounding)
    engine = kind(Accelerator(cpu=True), exact=True)
    optimizer = one_by_one if kind is FusedEngine or rounding != "nearest" else inner
    engine.prepare(module, optimizer)
    return engine, optimizer


def loss_of(module, step):
    inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).to(module[0][0].weight.dtype)
    return (module(inputs).float() - 1).square().mean()


def train(engine, optimizer, module, steps=range(5)):
    norms = []
    for step in steps:
        set_rates(optimizer, 1.0 / (step + 1), global_step=step)
        with engine.micro_batch(is_last=True):
            engine.backward(loss_of(module, step))
        norms.append(engine.grad_norm())
        engine.step()
    return norms


@pytest.mark.parametrize("name", ["adamw", "lion", pytest.param("adafactor", marks=pytest.mark.slow),
                                  pytest.param("adamw8bit", marks=pytest.mark.slow)])  # fmt: skip
def test_fused_updates_have_the_bits_of_unfused_ones(name):
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    plain, fused = make_module(), make_module()

    norms = train(*engine_of(PlainEngine, plain, name=name), plain)
    fused_norms = train(*engine_of(FusedEngine, fused, name=name), fused)

    for parameter, expected in zip(fused.parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter, expected)
    assert fused_norms == pytest.approx(norms, rel=1e-6)


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_bf16_weights_round_the_same_fused_or_not(rounding):
    plain, fused = make_module(torch.bfloat16), make_module(torch.bfloat16)

    train(*engine_of(PlainEngine, plain, rounding=rounding), plain)
    train(*engine_of(FusedEngine, fused, rounding=rounding), fused)

    for parameter, expected in zip(fused.parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter, expected)


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_gradients_are_never_all_alive(is_checkpointed):
    module = make_module()
    engine, optimizer = engine_of(FusedEngine, module)
    alive = []
    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in module.parameters()))
        )
    real, most = engine._one_by_one.step_parameter, []

    def watched(parameter):
        most.append(sum(p.grad is not None for p in module.parameters()))
        real(parameter)

    engine._one_by_one.step_parameter = watched
    set_rates(optimizer, 1.0, global_step=0)
    values = torch.ones(2, 8)
    for block in module:
        values = (
            torch.utils.checkpoint.checkpoint(block, values, use_reentrant=False) if is_checkpointed else block(values)
        )
    engine.backward(values.square().mean())

    assert len(most) == len(list(module.parameters())) == 12
    assert max(most) <= 2  # a layer's weight and bias come together
    assert max(alive) <= 1


def test_a_parameter_used_twice_is_updated_once():
    plain, fused = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    fused.load_state_dict(plain.state_dict())
    for kind, module in ((PlainEngine, plain), (FusedEngine, fused)):
        engine, optimizer = engine_of(kind, module)
        set_rates(optimizer, 1.0, global_step=0)
        engine.backward(module(module(torch.ones(2, 4))).square().mean())
        engine.step()

    assert torch.equal(plain.weight, fused.weight)


@pytest.mark.parametrize("loss, norm", [(math.nan, math.nan), (math.inf, math.nan), (0.0, 0.0)])
def test_a_loss_that_is_not_finite_or_holds_no_image_updates_nothing(loss, norm):
    module = make_module()
    engine, optimizer = engine_of(FusedEngine, module)
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    set_rates(optimizer, 1.0, global_step=0)

    engine.backward(loss_of(module, 0) * 0 + loss)

    assert engine.grad_norm() == pytest.approx(norm, nan_ok=True)
    engine.skip()
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())
    assert not optimizer.state
    train(engine, optimizer, module, [1])
    assert optimizer.state


def test_a_gradient_that_is_not_finite_under_a_finite_loss_ends_with_the_step_to_roll_back():
    module = make_module()
    engine, optimizer = engine_of(FusedEngine, module)
    module[0][0].weight.register_hook(lambda gradient: gradient * math.inf)
    set_rates(optimizer, 1.0, global_step=6)

    engine.backward(loss_of(module, 0))

    assert not math.isfinite(engine.grad_norm())
    with pytest.raises(NonFiniteError, match="step 7: a gradient is not finite although the loss is") as error:
        engine.skip()
    assert list(error.value.steps) == [7]


def test_what_cannot_be_done_afterwards_is_said(caplog):
    module = make_module()
    engine, optimizer = engine_of(FusedEngine, module)
    train(engine, optimizer, module, [0])

    with caplog.at_level(logging.WARNING):
        engine.scale_gradients(2.0)
        engine.scale_gradients(2.0)

    assert len(caplog.records) == 1
    with pytest.raises(ValueError, match="fused backward cannot clip"):
        engine.clip(1.0, 0.5)
    with pytest.raises(ValueError, match="steps one by one, got SGD"):
        FusedEngine(Accelerator(cpu=True), exact=True).prepare(module, torch.optim.SGD(module.parameters()))


def test_several_processes_are_refused():
    accelerator = Accelerator(cpu=True)

    class Two:
        process_index, num_processes, device = 0, 2, accelerator.device

    with pytest.raises(ValueError, match="2 processes would each make their own update"):
        FusedEngine(Two(), exact=True)
