"""Stage C and its text encoder, at toy size, in every number format, with and without fused backward."""

import math

import pytest
import torch
from accelerate import Accelerator

from scripts.demo_models.stage_c import make_stage_c_models
from tests.training.toy import toy_config
from training.engines.fused import FusedEngine
from training.engines.plain import PlainEngine
from training.engines.scaled import ScaledEngine
from training.optim.from_config import optimizer_from_config
from training.optim.loss_scale import LossScale
from training.optim.selection import PatternError
from training.optimizers import set_rates
from training.precision import set_weights
from training.stage_c.formats import load_stage_c
from training.stage_c.model import StageCModel
from training.stage_c.text import TextConditioner
from training.stage_c.text_files import load_text_model


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return make_stage_c_models(tmp_path_factory.mktemp("models"), seed=0)


def model_of(paths, *, checkpointed=False):
    network = load_stage_c(paths["stage_c"])
    network.clip_img_mapper.weight.requires_grad_(False)
    if checkpointed:
        network.enable_gradient_checkpointing()
    return StageCModel(network, TextConditioner(load_text_model(paths["text_encoder"]))).eval()  # no dropout


def train(model, engine, optimizer, *, steps=4):
    generator = torch.Generator().manual_seed(0)
    noised, target = torch.randn(2, 2, 16, 4, 4, generator=generator)
    windows = torch.randint(1000, 2000, (2, 1, 77), generator=generator)
    windows[:, :, 40:] = 49407
    losses, norms = [], []
    for step in range(steps):
        set_rates(optimizer, 1.0, global_step=step)
        with engine.micro_batch(is_last=True):
            with engine.autocast():
                predicted = model(noised, torch.tensor([0.2, 0.7]), windows=windows, states=None, mask=True)
                loss = (predicted.float() - target).square().mean()
            engine.backward(loss)
        losses.append(float(loss.detach()))
        norms.append(engine.grad_norm())
        if math.isfinite(norms[-1]):
            engine.step()
        else:
            engine.skip()
    return losses, norms


def run(paths, *, weights, fused=False, checkpointed=False, **optimizer):
    autocast = "bf16" if weights == "fp32" else weights
    settings = {"learning_rate": 1e-3, "max_grad_norm": 0.0, "fused_backward": fused, **optimizer}
    config = toy_config(
        optimizer=settings, precision={"weights": weights, "autocast": autocast}, batch={"batch_size": 2}
    )
    model = model_of(paths, checkpointed=checkpointed)
    set_weights(model, weights)

    def parts():
        return {"network": model.network.parameters(), "text_encoder": model.text.parameters()}

    rates = {"network": 1e-3, "text_encoder": 1e-3}
    made = optimizer_from_config(config, model, parts, learning_rates=rates)
    if weights == "fp16":
        engine = ScaledEngine(Accelerator(cpu=True), exact=True, loss_scale=LossScale())
    else:
        engine = (FusedEngine if fused else PlainEngine)(Accelerator(cpu=True, mixed_precision="bf16"), exact=True)
    engine.prepare(model, made)
    result = train(model, engine, made)
    return model, made, *result


@pytest.fixture(autouse=True)
def fresh_accelerate():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.slow
@pytest.mark.parametrize("weights, fused", [("fp32", False), ("fp32", True), ("bf16", False), ("bf16", True),
                                            ("fp16", False)])  # fmt: skip
def test_stage_c_learns_in_every_format(paths, weights, fused):
    model, optimizer, losses, norms = run(paths, weights=weights, fused=fused, checkpointed=fused)

    assert {str(parameter.dtype) for parameter in model.parameters()} == {
        {"fp32": "torch.float32", "bf16": "torch.bfloat16", "fp16": "torch.float16"}[weights]
    }
    assert losses[-1] < losses[0]
    assert sum(map(math.isfinite, norms)) >= 3
    assert {slot.dtype for state in optimizer.state.values() for slot in state.values()} == {torch.float32}


@pytest.mark.slow
def test_formats_agree_on_the_gradient(paths):
    norms = {weights: run(paths, weights=weights)[3] for weights in ("fp32", "bf16", "fp16")}

    assert norms["bf16"][0] == pytest.approx(norms["fp32"][0], rel=0.05)
    assert next(filter(math.isfinite, norms["fp16"])) == pytest.approx(norms["fp32"][0], rel=0.05)


@pytest.mark.slow
def test_patterns_reach_the_parts_of_stage_c(paths, caplog):
    caplog.set_level("INFO")

    part = {"name": "mappers", "parameters": ["network.clip_*"], "learning_rate": 5e-4}
    _, optimizer, _, _ = run(
        paths, weights="fp32", freeze=["text.*embeddings*", "re:down_blocks\\.0\\."], parts=[part], weight_decay=0.1
    )

    groups = {(group["part"], group["weight_decay"]): len(group["params"]) for group in optimizer.param_groups}
    assert {part for part, _ in groups} == {"network", "text_encoder", "mappers"}
    assert {decay for _, decay in groups} == {0.1, 0.0}
    assert "frozen: " in caplog.text
    with pytest.raises(PatternError, match=r"optimizer\.freeze: 'unet\.\*' matches no parameter"):
        run(paths, weights="fp32", freeze=["unet.*"])


@pytest.mark.slow
def test_fused_updates_of_stage_c_have_the_bits_of_unfused_ones(paths):
    plain, _, losses, _ = run(paths, weights="fp32", checkpointed=True)
    fused, _, fused_losses, _ = run(paths, weights="fp32", checkpointed=True, fused=True)

    assert fused_losses == losses
    assert all(torch.equal(p, q) for p, q in zip(fused.parameters(), plain.parameters(), strict=True))
