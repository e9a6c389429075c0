import pytest
from pydantic import ValidationError

from training.config.optimizer import (
    OptimizerConfig,
    ScheduleConfig,
    fused_backward_problems,
    optimizer_problems,
)
from training.config.precision import EmaConfig, PrecisionConfig


@pytest.mark.parametrize(
    "table, values, message",
    [
        (OptimizerConfig, {"name": "sgd"}, "name"),
        (OptimizerConfig, {"name": "adafactor", "betas": (0.9, 0.99)}, "betas is set, but adafactor does not read it"),
        (OptimizerConfig, {"name": "lion", "eps": 1e-6}, "eps is set, but lion does not read it; it is for adam8bit"),
        (OptimizerConfig, {"prodigy_d_coef": 2}, "it is for prodigy"),
        (OptimizerConfig, {"adafactor_clip_threshold": 2}, "it is for adafactor"),
        (OptimizerConfig, {"betas": (0.9, 1.0)}, "below 1"),
        (OptimizerConfig, {"parts": [{"name": "a", "parameters": ["*"], "learning_rate": 1}] * 2}, "two are named 'a'"),
        (OptimizerConfig, {"parts": [{"name": "a", "parameters": [], "learning_rate": 1}]}, "parameters"),
        (ScheduleConfig, {"name": "polynomial"}, "needs total_steps"),
        (ScheduleConfig, {"total_steps": 50}, "must be greater than warmup_steps 100"),
        (ScheduleConfig, {"power": 2.0}, "power is set, but constant_with_warmup does not read it"),
        (ScheduleConfig, {"name": "cosine", "total_steps": 500, "restarts": 2}, "it is for cosine_with_restarts"),
        (ScheduleConfig, {"name": "constant", "end_fraction": 0.1}, "end_fraction is set"),
        (ScheduleConfig, {"name": "piecewise_constant"}, "expected"),
        (ScheduleConfig, {"rules": "1:2,3"}, "it is for piecewise_constant"),
        (PrecisionConfig, {"weights": "bf16", "autocast": "no"}, 'weights "bf16" need autocast "bf16", got "no"'),
        (PrecisionConfig, {"weights": "fp16", "autocast": "fp16", "rounding": "stochastic"}, "loses first is range"),
        (PrecisionConfig, {"rounding": "kahan"}, "fp32 weights are not rounded"),
        (EmaConfig, {"decay": 0.5, "min_decay": 0.6}, "min_decay 0.6 is greater than decay 0.5"),
        (EmaConfig, {"warmup_power": 0.75}, 'read with warmup = "power" only'),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(table, values, message):
    with pytest.raises(ValidationError, match=message):
        table(**values)


@pytest.mark.parametrize(
    "values, rounding",
    [
        ({}, "nearest"), ({"weights": "bf16"}, "stochastic"), ({"weights": "bf16", "rounding": "kahan"}, "kahan"),
        ({"weights": "bf16", "rounding": "nearest"}, "nearest"), ({"weights": "fp16", "autocast": "fp16"}, "nearest"),
    ],
)  # fmt: skip
def test_weights_are_rounded_by_chance_when_they_are_bf16(values, rounding):
    assert PrecisionConfig(**values).weight_rounding == rounding


def problems(*, schedule="constant", weights="fp32", ema=False, **optimizer):
    precision = PrecisionConfig(weights=weights)
    total = None if schedule.startswith("constant") else 500
    return optimizer_problems(
        OptimizerConfig(**optimizer),
        ScheduleConfig(name=schedule, total_steps=total),
        precision,
        EmaConfig(enabled=ema),
    )


def test_tables_that_do_not_go_together_are_all_listed():
    assert problems() == problems(weights="bf16") == problems(name="prodigy", learning_rate=1.0) == []
    assert problems(name="schedule_free", schedule="constant_with_warmup") == []
    assert len(problems(name="prodigy", weights="bf16", text_encoder_learning_rate=1.0)) == 3
    assert len(problems(name="schedule_free", schedule="cosine", ema=True, betas=(0.0, 0.9))) == 3


def test_fused_backward_is_refused_with_every_reason():
    settings = OptimizerConfig(name="prodigy", learning_rate=1.0, fused_backward=True)

    found = fused_backward_problems(settings, PrecisionConfig(autocast="fp16"), micro_batches_per_step=4, world_size=2)

    assert [problem.split(": ")[1].split(" ")[0] for problem in found] == [
        "a",
        "2",
        "max_grad_norm",
        "prodigy",
        "precision.autocast",
    ]
    fitting = OptimizerConfig(fused_backward=True, max_grad_norm=0)
    assert fused_backward_problems(fitting, PrecisionConfig(weights="bf16"), micro_batches_per_step=1) == []
    assert fused_backward_problems(OptimizerConfig(), PrecisionConfig(), micro_batches_per_step=4, world_size=2) == []
