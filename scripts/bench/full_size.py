"""One optimizer step of stage C with its text encoder trained, on a CPU: the most memory it takes, beside the plan.

bf16 weights with stochastic rounding, Adafactor, updates inside backward, gradient checkpointing, one picture: what the
smallest card would be given. --full is the true size, 3.59 + 0.69 billion parameters: 9 GB of disk for a while, 12 GB
of memory, and minutes on two cores. Weights are random, in files as published, and read by the recipe's own loader.
"""

import os
import tempfile
from pathlib import Path

from scripts.bench.measured_step import measure, run_values, write_weights
from scripts.bench.memory import planned
from scripts.bench.result import Bar, Result
from training.config import RunConfig

_SIDE = 768
"""What the encoder sees of a picture of 1024 pixels."""
_SMALL = {"c_cond": 512, "c_hidden": (1024, 1024), "num_heads": (16, 16), "blocks_down": (2, 6), "blocks_up": (6, 2)}
_SMALL_TEXT = {"num_hidden_layers": 4}


def run(*, full: bool, data: Path | None) -> Result:
    """Measure; `data` is a folder with room for the weights, the system's temporary one when None."""
    with tempfile.TemporaryDirectory(dir=data) as folder:
        root = Path(folder)
        write_weights(root, network={} if full else _SMALL, text={} if full else _SMALL_TEXT)
        values = run_values(root, side=_SIDE, num_threads=os.cpu_count() or 1)
        values["optimizer"] = {"name": "adafactor", "fused_backward": True, "max_grad_norm": 0.0}
        values["precision"] |= {"autocast": "bf16", "weights": "bf16", "rounding": "stochastic"}
        values["stage_c"] |= {"train_text_encoder": True, "gradient_checkpointing": True}
        estimate = planned(RunConfig.model_validate(values))
        found = measure(root, values, num_steps=1)
    peak = max(found.load_peak_bytes, found.step_peak_bytes)
    return Result(
        bench="full_size",
        figures={
            "parameters_millions": found.num_parameters / 1e6,
            "peak_gigabytes": (peak + found.idle_bytes) / 1e9,
            "of_it_libraries_gigabytes": found.idle_bytes / 1e9,
            "load_peak_gigabytes": found.load_peak_bytes / 1e9,
            "planned_load_gigabytes": estimate.load_peak / 1e9,
            "step_peak_gigabytes": found.step_peak_bytes / 1e9,
            "planned_step_gigabytes": estimate.step_peak(1) / 1e9,
            "planner_error_fraction": abs(estimate.peak(1) / peak - 1),
            "step_seconds": found.step_seconds,
            "loss": found.loss,
        },
        bars=[Bar("peak_gigabytes", at_most=20), Bar("planner_error_fraction", at_most=0.1)],
        full_size=full,
        peer="none",
        notes=["load and step without the libraries' share; weights are random: the loss need only be finite"],
    )
