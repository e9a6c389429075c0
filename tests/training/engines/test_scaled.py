import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from training.engines.plain import PlainEngine
from training.engines.scaled import ScaledEngine
from training.optim.loss_scale import LossScale
from training.optim.one_by_one import OneByOne
from training.optimizers import make_optimizer, set_rates


def make_module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def engine_of(module, *, scale=65536.0, low=False):
    optimizer = make_optimizer("adamw", {"all": module.parameters()}, learning_rates={"all": 1e-2})
    if low:
        optimizer = OneByOne(optimizer, {parameter: key for key, parameter in module.named_parameters()})
    engine = ScaledEngine(Accelerator(cpu=True), exact=True, loss_scale=LossScale(scale))
    engine.prepare(module, optimizer)
    return engine, optimizer


def run_step(engine, optimizer, module, *, factor=1.0, step=0):
    set_rates(optimizer, 1.0, global_step=step)
    inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
    with engine.micro_batch(is_last=True), engine.autocast():
        output = module(inputs)
        engine.backward((output.float() - 1).square().mean() * factor)
    assert output.dtype == torch.float16
    return engine.grad_norm()


def test_norm_and_update_are_those_of_the_true_gradients():
    plain, scaled = make_module(), make_module()
    optimizer = make_optimizer("adamw", {"all": plain.parameters()}, learning_rates={"all": 1e-2})
    reference = PlainEngine(Accelerator(cpu=True), exact=True)
    reference.prepare(plain, optimizer)
    with torch.autocast("cpu", dtype=torch.float16):
        inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
        reference.backward((plain(inputs).float() - 1).square().mean())
    expected = reference.grad_norm()
    reference.step()
    engine, own = engine_of(scaled, scale=1024.0)

    norm = run_step(engine, own, scaled)
    engine.step()

    assert norm == pytest.approx(expected, rel=1e-2)
    torch.testing.assert_close(scaled[0].weight, plain[0].weight, rtol=0, atol=2e-3)


def test_clipping_is_by_the_true_norm():
    module = make_module()
    engine, optimizer = engine_of(module, scale=1024.0)
    norm = run_step(engine, optimizer, module)

    engine.clip(norm, norm / 10)

    assert engine.grad_norm() == pytest.approx(norm / 10, rel=1e-3)


def test_gradients_that_overflow_halve_the_scale_and_update_nothing():
    module = make_module()
    engine, optimizer = engine_of(module)
    before = module[0].weight.detach().clone()

    norm = run_step(engine, optimizer, module, factor=1000.0)
    engine.skip()

    assert not math.isfinite(norm)
    assert engine.loss_scale.scale == 32768
    assert torch.equal(module[0].weight, before)


def test_a_step_passed_over_for_another_reason_leaves_the_scale():
    module = make_module()
    engine, optimizer = engine_of(module, scale=1024.0)

    run_step(engine, optimizer, module)
    engine.skip()

    assert engine.loss_scale.scale == 1024


def test_gradients_too_small_for_fp16_train_fp16_weights():
    module = make_module().half()
    engine, optimizer = engine_of(module, low=True)

    norm = run_step(engine, optimizer, module, factor=1e-6)
    before = module[2].weight.detach().clone()
    engine.step()

    assert 1e-8 < norm < 1e-4
    assert (module[2].weight != before).float().mean() > 0.5
    assert optimizer.state[module[2].weight]["exp_avg"].dtype == torch.float32
