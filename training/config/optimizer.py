"""Settings of a run: the optimizer, its learning rate, and number formats."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from sharding.config import Config


class OptimizerConfig(Config):
    """The optimizer."""

    name: Literal["adamw", "adafactor"] = "adamw"
    """`adafactor` is the factored one of the seed: relative_step, scale_parameter and warmup_init off."""
    learning_rate: float = Field(1e-5, gt=0)
    """Peak learning rate of the main network."""
    text_encoder_learning_rate: float | None = Field(None, gt=0)
    """Learning rate of the text encoder when it is trained; default: learning_rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's; Adafactor has its own constants (beta2 = 1 - step^-0.8, clip threshold 1)."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled, times the learning rate."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are clipped to this norm; 0 does not clip."""


class ScheduleConfig(Config):
    """Learning rate as a pure function of the global step over the whole run."""

    name: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    """Shape of the rate; only `constant` has no warm-up."""
    warmup_steps: int = Field(100, ge=0)
    """Steps from 0 to the peak, once per run, not once per chunk."""
    total_steps: int | None = Field(None, gt=0)
    """Horizon of `linear` and `cosine`; `python -m training plan` prints the run's number of steps."""

    @model_validator(mode="after")
    def _horizon(self) -> "ScheduleConfig":
        if self.name in ("linear", "cosine") and self.total_steps is None:
            raise ValueError(f'name "{self.name}" needs total_steps: `python -m training plan` prints the number')
        if self.total_steps is not None and self.total_steps <= self.warmup_steps:
            raise ValueError(f"total_steps {self.total_steps} must be greater than warmup_steps {self.warmup_steps}")
        return self


class PrecisionConfig(Config):
    """Number formats."""

    FREE: ClassVar = frozenset({"num_threads"})

    autocast: Literal["no", "bf16"] = "bf16"
    """Compute format of the trained forward; weights stay fp32."""
    exact: bool | None = None
    """Fixed-order gradient reduction and deterministic kernels: bit-equal resume. Default: on a CPU only."""
    num_threads: int | None = Field(None, gt=0)
    """Pinned CPU threads per process; default: OMP_NUM_THREADS, else 1 in exact mode."""
