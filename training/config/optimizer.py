"""Settings of a run: the optimizer and its learning rate, and what goes with them."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from sharding.config import Config, Name
from training.config.precision import EmaConfig, PrecisionConfig
from training.schedules import NEEDS_HORIZON, parse_rules

OptimizerName = Literal["adamw", "adafactor", "lion", "adam8bit", "adamw8bit", "lion8bit", "prodigy", "schedule_free"]
ScheduleName = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "piecewise_constant",
]

NEEDS_ALL_GRADIENTS = frozenset({"prodigy", "schedule_free"})
"""Optimizers whose step cannot be taken parameter by parameter: they keep one number for all of them."""
_ADAM_LIKE = frozenset({"adamw", "adam8bit", "adamw8bit", "prodigy", "schedule_free"})
_LION_LIKE = frozenset({"lion", "lion8bit"})
_READ_BY = {
    "betas": _ADAM_LIKE | _LION_LIKE,
    "eps": _ADAM_LIKE,
    "adafactor_eps": {"adafactor"},
    "adafactor_clip_threshold": {"adafactor"},
    "prodigy_d_coef": {"prodigy"},
    "prodigy_bias_correction": {"prodigy"},
    "prodigy_safeguard_warmup": {"prodigy"},
}


class PartConfig(Config):
    """Parameters with a learning rate of their own."""

    name: Name
    """Name of the part, for the chart `lr/NAME`."""
    parameters: tuple[str, ...] = Field(min_length=1)
    """Patterns of parameter names."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate."""


class OptimizerConfig(Config):
    """The optimizer. A pattern is a glob over parameter names (`network.clip_*`), or `re:` and a regular expression
    that is found anywhere in the name; one that matches nothing is an error."""

    name: OptimizerName = "adamw"
    """`adafactor` is the factored one of the seed: relative_step, scale_parameter and warmup_init off. The 8-bit ones
    need bitsandbytes, `prodigy` and `schedule_free` the packages of the extra `optimizers`."""
    learning_rate: float = Field(1e-5, gt=0)
    """Peak learning rate of the main network; `prodigy` multiplies its own estimate by it: 1.0."""
    text_encoder_learning_rate: float | None = Field(None, gt=0)
    """Learning rate of the text encoder when it is trained; default: learning_rate."""
    parts: tuple[PartConfig, ...] = ()
    """Tables of name, parameters, learning_rate: parameters that get a rate of their own."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameters that are not trained."""
    betas: tuple[float, float] | None = None
    """Default: (0.9, 0.999), for Lion (0.9, 0.99); Adafactor has its own (beta2 = 1 - step^-0.8)."""
    eps: float = Field(1e-8, gt=0)
    """Of the Adam family: added to the root of the second moment."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled, times the learning rate. (In bitsandbytes so is adam8bit's: it is adamw8bit by another name.)"""
    decay_vectors: bool = False
    """Let parameters of one dimension decay, too: biases and the scales of norms."""
    no_decay: tuple[str, ...] = ()
    """Patterns of more parameters that do not decay."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are clipped to this norm; 0 does not clip."""
    fused_backward: bool = False
    """Update each parameter inside the backward pass and free its gradient at once: no memory for gradients. One
    process, one micro-batch per step, max_grad_norm 0."""
    adafactor_eps: float = Field(1e-30, gt=0)
    """Adafactor: added to squared gradients."""
    adafactor_clip_threshold: float = Field(1.0, gt=0)
    """Adafactor: the largest root mean square of a parameter's update, in learning rates."""
    prodigy_d_coef: float = Field(1.0, gt=0)
    """Prodigy: factor on its estimate of the step size."""
    prodigy_bias_correction: bool = False
    """Prodigy: Adam's bias correction."""
    prodigy_safeguard_warmup: bool = False
    """Prodigy: keep a warm-up's small rates out of the estimate; advised with warm-up."""

    @field_validator("betas")
    @classmethod
    def _betas_are_shares(cls, betas: tuple[float, float] | None) -> tuple[float, float] | None:
        if betas is not None and not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"both must be at least 0 and below 1, got {list(betas)}")
        return betas

    @model_validator(mode="after")
    def _keys_are_read(self) -> "OptimizerConfig":
        for key, readers in _READ_BY.items():
            if self.name not in readers and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is set, but {self.name} does not read it; it is for {_names(readers)}")
        if doubled := _doubled([part.name for part in self.parts]):
            raise ValueError(f"parts: two are named {doubled!r}")
        return self


class ScheduleConfig(Config):
    """Learning rate as a pure function of the global step over the whole run. Formulas: `training.schedules`."""

    name: ScheduleName = "constant_with_warmup"
    """Shape of the rate; `constant` and `piecewise_constant` have no warm-up."""
    warmup_steps: int = Field(100, ge=0)
    """Steps from 0 to the peak, once per run, not once per chunk."""
    total_steps: int | None = Field(None, gt=0)
    """Horizon of `linear`, `cosine`, `cosine_with_restarts`, `polynomial`; `python -m training plan` prints the run's
    number of steps."""
    end_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of the peak that those four end with."""
    restarts: int = Field(1, ge=1)
    """`cosine_with_restarts`: how many times it falls from the peak."""
    power: float = Field(1.0, gt=0)
    """`polynomial`: its exponent; 1 is `linear`."""
    rules: str = ""
    """`piecewise_constant`: "1:1000,0.1:2000,0.01" is the peak before step 1000, a tenth before 2000, then 1 %."""

    @model_validator(mode="after")
    def _horizon(self) -> "ScheduleConfig":
        if self.name in NEEDS_HORIZON and self.total_steps is None:
            raise ValueError(f'name "{self.name}" needs total_steps: `python -m training plan` prints the number')
        if self.total_steps is not None and self.total_steps <= self.warmup_steps:
            raise ValueError(f"total_steps {self.total_steps} must be greater than warmup_steps {self.warmup_steps}")
        readers = {"end_fraction": NEEDS_HORIZON, "restarts": {"cosine_with_restarts"}, "power": {"polynomial"}}
        for key, names in {**readers, "rules": {"piecewise_constant"}}.items():
            if self.name not in names and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is set, but {self.name} does not read it; it is for {_names(names)}")
        if self.name == "piecewise_constant":
            parse_rules(self.rules)
        return self


def optimizer_problems(
    optimizer: OptimizerConfig, schedule: ScheduleConfig, precision: PrecisionConfig, ema: EmaConfig
) -> list[str]:
    """Return what does not go together in these tables, one sentence each; empty when all is well."""
    name, problems = optimizer.name, []
    if name in NEEDS_ALL_GRADIENTS and precision.weights != "fp32":
        problems.append(
            f'optimizer.name "{name}" and precision.weights "{precision.weights}": its state is as fine as the weights '
            'are, and it needs all of them at once; use weights = "fp32"'
        )
    if name == "prodigy":
        rates = {optimizer.learning_rate, optimizer.text_encoder_learning_rate or optimizer.learning_rate}
        if len(rates | {part.learning_rate for part in optimizer.parts}) > 1:
            problems.append('optimizer.name "prodigy" has one learning rate for all: give no other rates')
        if optimizer.learning_rate < 0.01:
            problems.append(
                f"optimizer.learning_rate {optimizer.learning_rate:g}: prodigy multiplies its own estimate by it; 1.0"
            )
    if name == "schedule_free":
        if schedule.name not in ("constant", "constant_with_warmup"):
            problems.append(f'optimizer.name "schedule_free" replaces schedule.name "{schedule.name}": use a constant')
        if optimizer.betas is not None and optimizer.betas[0] == 0:
            problems.append("optimizer.betas: schedule_free divides by the first one; it must be greater than 0")
        if ema.enabled:
            problems.append('optimizer.name "schedule_free" averages weights itself: switch ema.enabled off')
    return problems


def fused_backward_problems(
    optimizer: OptimizerConfig, precision: PrecisionConfig, *, micro_batches_per_step: int, world_size: int = 1
) -> list[str]:
    """Return every reason why parameters cannot be updated inside backward; empty when they can or need not."""
    if not optimizer.fused_backward:
        return []
    problems = []
    if micro_batches_per_step != 1:
        problems.append(f"a step has {micro_batches_per_step} micro-batches: set batch_size = micro_batch_size")
    if world_size != 1:
        problems.append(f"{world_size} processes would each make their own update: launch one")
    if optimizer.max_grad_norm > 0:
        problems.append(f"max_grad_norm {optimizer.max_grad_norm:g} needs all gradients first: set it to 0")
    if optimizer.name in NEEDS_ALL_GRADIENTS:
        problems.append(f"{optimizer.name} needs all gradients at once: use another optimizer")
    if precision.autocast == "fp16":
        problems.append('precision.autocast "fp16" must see all gradients before an update: use "bf16"')
    return [f"optimizer.fused_backward: {problem}" for problem in problems]


def _names(names: Any) -> str:
    return ", ".join(sorted(names))


def _doubled(names: list[str]) -> str | None:
    return next((name for name in names if names.count(name) > 1), None)
