"""Settings of a run: how several processes share a model, and what each way of sharing cannot do. No torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from sharding.config import Config

Strategy = Literal["auto", "single", "ddp", "fsdp2", "zero1", "zero2", "zero3"]

_ZERO = ("zero1", "zero2", "zero3")
IN_PARTS = ("fsdp2", *_ZERO)
"""Strategies with which no process holds all that is trained."""


class ParallelConfig(Config):
    """How several processes share a model. All keys are free: states of one strategy and number of processes load in
    every other. What a strategy cannot do: `limits_table`."""

    FREE: ClassVar = frozenset({"strategy", "shard", "offload", "gradients_meet"})

    strategy: Strategy = "auto"
    """`single`: one process. `ddp`: each holds everything. `fsdp2`: weights, gradients and optimizer in parts. `zero1`:
    optimizer; `zero2`: gradients, too; `zero3`: weights, too (DeepSpeed). auto: ddp if there are several, else single.
    """
    shard: Literal["full", "hybrid"] = "full"
    """fsdp2: cut over all processes, or over those of one machine, with a copy on every machine."""
    offload: Literal["none", "optimizer", "optimizer_and_weights"] = "none"
    """zero: keep the optimizer's state and its weights in CPU memory; with zero3 also all weights not in use."""
    gradients_meet: Literal["step", "micro_batch"] = "step"
    """fsdp2: bring gradients together once per step (until then every process holds whole ones, 4 bytes per parameter),
    or after every micro-batch (only parts, but more is sent)."""

    @model_validator(mode="after")
    def _keys_are_read(self) -> "ParallelConfig":
        for key in ("shard", "gradients_meet"):
            if getattr(self, key) != type(self).model_fields[key].default and self.strategy != "fsdp2":
                raise ValueError(f'{key} "{getattr(self, key)}" is read with strategy = "fsdp2" only')
        if self.offload != "none" and self.strategy not in _ZERO:
            raise ValueError(f'offload "{self.offload}" is read with strategy = "zero1", "zero2" or "zero3" only')
        if self.offload == "optimizer_and_weights" and self.strategy != "zero3":
            raise ValueError(f'offload "{self.offload}" needs strategy = "zero3", got "{self.strategy}"')
        return self


@dataclass(frozen=True)
class Limit:
    """Something that some strategies cannot do. is_asked_for(config): None where it is said, not refused."""

    what: str
    strategies: tuple[str, ...]
    why: str
    is_asked_for: Callable[[Any], bool] | None = None


LIMITS = (
    Limit(
        "`optimizer.fused_backward`", ("ddp", *IN_PARTS), "each process would make its own update",
        lambda config: config.optimizer.fused_backward,
    ),
    Limit(
        "`precision.weights` of 16 bits", IN_PARTS, "what is trained is fp32; only the forward computes in bf16",
        lambda config: config.precision.weights != "fp32",
    ),
    Limit(
        '`precision.autocast = "fp16"`', IN_PARTS, "the loss scale is kept for whole gradients",
        lambda config: config.precision.autocast == "fp16",
    ),
    Limit(
        "`adam8bit`, `adamw8bit`, `lion8bit`", IN_PARTS, "their blocks of 256 values do not follow the cuts",
        lambda config: config.optimizer.name.endswith("8bit"),
    ),
    Limit(
        "`prodigy`", IN_PARTS, "its estimate is a sum over all parameters, and each process has parts of them",
        lambda config: config.optimizer.name == "prodigy",
    ),
    Limit(
        "`adafactor`", _ZERO, "DeepSpeed flattens parameters: there are no rows and columns",
        lambda config: config.optimizer.name == "adafactor",
    ),
    Limit(
        "`schedule_free`", _ZERO, "its average is made from whole parameters",
        lambda config: config.optimizer.name == "schedule_free",
    ),
    Limit(
        "`ema`", ("zero3",), "weights lie in parts that the average cannot follow", lambda config: config.ema.enabled
    ),
    Limit(
        "`compile`", IN_PARTS, "not tried with networks in parts",
        lambda config: getattr(config, "compile", "no") != "no",
    ),
    Limit("exact mode: sums in a fixed order", IN_PARTS, "sums are the library's: about 1e-7 from those of `ddp`"),
    Limit("less memory for fp32 weights in forward and backward", ("ddp", "zero1", "zero2"), "each process holds all"),
)  # fmt: skip


def parallel_problems(config: Any) -> list[str]:
    """Return what the strategy of a RunConfig cannot do of what it asks for, one sentence each; empty when all is well.

    "auto" is judged when the number of processes is known.
    """
    strategy = config.parallel.strategy
    return [
        f'parallel.strategy "{strategy}" cannot do {limit.what.replace("`", "")}: {limit.why}'
        for limit in LIMITS
        if limit.is_asked_for is not None and strategy in limit.strategies and limit.is_asked_for(config)
    ]


def limits_table() -> str:
    """Return what each strategy cannot do, as a table in Markdown."""
    columns = ("single", "ddp", *IN_PARTS)
    rows = [
        f"| {limit.what} | {' | '.join('no' if one in limit.strategies else '' for one in columns)} | {limit.why} |"
        for limit in LIMITS
    ]
    head = f"| cannot do | {' | '.join(f'`{one}`' for one in columns)} | why |"
    return "\n".join([head, "|---" * (len(columns) + 2) + "|", *rows])
