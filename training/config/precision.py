"""Settings of a run: number formats, and the running average of weights."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from sharding.config import Config


class PrecisionConfig(Config):
    """Number formats."""

    FREE: ClassVar = frozenset({"num_threads"})

    autocast: Literal["no", "bf16", "fp16"] = "bf16"
    """Compute format of the trained forward. `fp16` scales the loss, and halves the scale when gradients overflow."""
    weights: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Format of trained weights and their gradients. `bf16` halves both; `fp16` is what kohya's --full_fp16 does, and
    loses small updates."""
    rounding: Literal["nearest", "stochastic", "kahan"] | None = None
    """How an updated bf16 weight is rounded: `stochastic` (the default for bf16), `kahan` keeps what rounding lost in
    another bf16, `nearest` loses it."""
    exact: bool | None = None
    """Fixed-order gradient reduction and deterministic kernels: bit-equal resume. Default: on a CPU only."""
    num_threads: int | None = Field(None, gt=0)
    """Pinned CPU threads per process; default: OMP_NUM_THREADS, else 1 in exact mode."""

    @property
    def weight_rounding(self) -> Literal["nearest", "stochastic", "kahan"]:
        """How updated weights are rounded, the default resolved."""
        return self.rounding or ("stochastic" if self.weights == "bf16" else "nearest")

    @model_validator(mode="after")
    def _formats_fit(self) -> "PrecisionConfig":
        if self.weights != "fp32" and self.autocast != self.weights:
            raise ValueError(f'weights "{self.weights}" need autocast "{self.weights}", got "{self.autocast}"')
        if self.rounding in ("stochastic", "kahan") and self.weights != "bf16":
            why = {
                "fp32": "fp32 weights are not rounded",
                "fp16": "what fp16 loses first is range, in gradients below 6e-8 and weights above 65504",
            }[self.weights]
            raise ValueError(f'rounding "{self.rounding}" is for weights = "bf16": {why}')
        return self


class EmaConfig(Config):
    """A running average of the trained weights, in fp32, for previews and exports. Formulas: `training.ema`."""

    FREE: ClassVar = frozenset({"device"})

    enabled: bool = False
    """Keep an average; previews and exports then show it."""
    decay: float = Field(0.9999, ge=0, lt=1)
    """Share of the old average that a step keeps, at most."""
    min_decay: float = Field(0.0, ge=0, lt=1)
    """The same, at least; from the second averaged step on."""
    warmup: Literal["simple", "power"] = "simple"
    """Decay while the run is young: (1 + n) / (10 + n), or 1 - (1 + n / warmup_gamma)^-warmup_power."""
    warmup_gamma: float = Field(1.0, gt=0)
    """Of warmup = "power"."""
    warmup_power: float = Field(2 / 3, gt=0)
    """Of warmup = "power": 2/3 reaches 0.999 at 31,600 steps and 0.9999 at 1 M, 3/4 at 10,000 and 215,000."""
    start_step: int = Field(0, ge=0)
    """Up to this global step the average is a copy of the weights."""
    update_every: int = Field(1, ge=1)
    """Average every n-th step, with decay^n: the average reaches as far back, at less cost."""
    device: Literal["same", "cpu"] = "same"
    """Where it is kept: beside the weights, or in CPU memory (4 bytes per parameter)."""

    @model_validator(mode="after")
    def _bounds(self) -> "EmaConfig":
        if self.min_decay > self.decay:
            raise ValueError(f"min_decay {self.min_decay} is greater than decay {self.decay}")
        fields = type(self).model_fields
        if self.warmup != "power" and any(
            getattr(self, key) != fields[key].default for key in ("warmup_gamma", "warmup_power")
        ):
            raise ValueError('warmup_gamma and warmup_power are read with warmup = "power" only')
        return self
