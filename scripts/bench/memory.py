"""What the memory planner says against what processes take: loading and steps, in many settings, on a CPU.

Each row trains two steps of stage C, random weights, in a process of its own (`scripts.bench.measured_step`); the plan
is `training.memory.planner`'s for a CPU. The error of a row is that of max(load peak, step peak). What the planner says
of GPUs cannot be measured without one.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.bench.measured_step import Measured, measure, run_values, write_weights
from scripts.bench.result import Bar, Result
from training.config import RunConfig
from training.memory.architecture import architecture_of
from training.memory.planner import Estimate, Planner, largest_bucket, strategy_of

_SMALL = {"c_cond": 512, "c_hidden": (512, 512), "num_heads": (8, 8), "blocks_down": (2, 6), "blocks_up": (6, 2)}
_LARGE = _SMALL | {"c_cond": 768, "c_hidden": (768, 768), "num_heads": (12, 12)}
_TEXT = {
    "hidden_size": 640, "projection_dim": 640, "intermediate_size": 2560, "num_attention_heads": 10,
    "num_hidden_layers": 4,
}  # fmt: skip
_CLIP = {"c_clip_text": 640, "c_clip_text_pooled": 640}
_SIDE = 512

_ADAFACTOR = {"optimizer": {"name": "adafactor"}}
_AUTOCAST = {"precision": {"autocast": "bf16"}}
_BF16 = {"precision": {"autocast": "bf16", "weights": "bf16"}}
_FUSED = {"optimizer": {"name": "adafactor", "fused_backward": True, "max_grad_norm": 0.0}}
_LION_KAHAN = {"optimizer": {"name": "lion"}, "precision": {"rounding": "kahan"}}
_CHECKPOINTS = {"stage_c": {"gradient_checkpointing": True}}
_TEXT_TRAINED = {"stage_c": {"train_text_encoder": True}}
_EMA = {"ema": {"enabled": True}}
_LORA: dict[str, dict[str, Any]] = {"lora": {}}


@dataclass(frozen=True)
class Case:
    """A row: settings of a run, as tables that are merged in order."""

    name: str
    settings: tuple[Mapping[str, Mapping[str, Any]], ...] = ()
    micro_batch_size: int = 1
    num_micro_batches: int = 2

    def config(self, folder: Path) -> dict[str, Any]:
        """Return the run's settings."""
        sizes = {"micro_batch_size": self.micro_batch_size, "num_micro_batches": self.num_micro_batches}
        values = run_values(folder, side=_SIDE, num_threads=1, **sizes)
        for tables in self.settings:
            for table, entries in tables.items():
                values[table] = {**values.get(table, {}), **entries}
        return values


CASES = (
    Case("adamw fp32"),
    Case("adamw fp32, batch 2, one micro-batch", micro_batch_size=2, num_micro_batches=1),
    Case("adamw fp32, batch 4", micro_batch_size=4),
    Case("adamw fp32, batch 4, checkpoints", (_CHECKPOINTS,), micro_batch_size=4),
    Case("adamw fp32, ema, text trained, checkpoints", (_EMA, _CHECKPOINTS, _TEXT_TRAINED)),
    Case("adafactor fp32, bf16 autocast, batch 2", (_ADAFACTOR, _AUTOCAST), micro_batch_size=2),
    Case("adafactor bf16, text trained", (_ADAFACTOR, _BF16, _TEXT_TRAINED)),
    Case("adafactor bf16 fused, checkpoints, batch 2", (_FUSED, _BF16, _CHECKPOINTS), 2, num_micro_batches=1),
    Case("adafactor bf16 fused, text trained", (_FUSED, _BF16, _TEXT_TRAINED), num_micro_batches=1),
    Case("lion bf16 kahan, checkpoints", (_LION_KAHAN, _BF16, _CHECKPOINTS)),
    Case("lora, adamw, bf16 autocast, batch 2", (_LORA, _AUTOCAST), micro_batch_size=2),
)  # fmt: skip


def run(*, full: bool, data: Path | None) -> Result:
    """Measure; `data` is not used. --full: networks of 0.5 GB in place of 0.3 (fp32)."""
    rows: list[tuple[Case, Estimate, Measured]] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_weights(root, network=(_LARGE if full else _SMALL) | _CLIP, text=_TEXT)
        for case in CASES:
            values = case.config(root)
            rows.append((case, planned(RunConfig.model_validate(values)), measure(root, values, num_steps=2)))
    errors = {case.name: _error(case, estimate, found) for case, estimate, found in rows}
    return Result(
        bench="memory",
        figures={
            "configurations": len(rows),
            "largest_error_fraction": max(map(abs, errors.values())),
            "mean_error_fraction": sum(map(abs, errors.values())) / len(errors),
            **{
                f"error_{case.name.replace(', ', '_').replace(' ', '_').replace('-', '_')}": errors[case.name]
                for case, *_ in rows
            },
        },
        bars=[Bar("largest_error_fraction", at_most=0.1)],
        full_size=full,
        peer="peak resident memory of processes of their own, less what their libraries held before",
        notes=[_HEADER, *(_row(*row, errors[row[0].name]) for row in rows)],
    )


def planned(config: RunConfig) -> Estimate:
    """Return the planner's estimate of a run in one process."""
    planner = Planner(architecture_of(config), largest_bucket(config), max_tokens=config.of_stage_c.max_tokens)
    return planner.estimate(strategy_of(config, num_processes=1))


def _error(case: Case, estimate: Estimate, found: Measured) -> float:
    return estimate.peak(case.micro_batch_size) / max(found.load_peak_bytes, found.step_peak_bytes) - 1


_HEADER = f"{'MB above the libraries':<46} {'load: plan':>10} {'found':>7} {'step: plan':>11} {'found':>7} {'error':>7}"


def _row(case: Case, estimate: Estimate, found: Measured, error: float) -> str:
    load, step = estimate.load_peak / 1e6, estimate.step_peak(case.micro_batch_size) / 1e6
    measured = found.load_peak_bytes / 1e6, found.step_peak_bytes / 1e6
    return f"{case.name:<46} {load:>10.0f} {measured[0]:>7.0f} {step:>11.0f} {measured[1]:>7.0f} {error:>+7.1%}"
