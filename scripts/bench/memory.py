"""One optimizer step of stage C with its text encoder on a CPU: the most memory it takes, beside the planner's word.

bf16 weights with stochastic rounding, Adafactor, updates inside backward, gradient checkpointing, one picture: what the
smallest card would be given. Weights are random, in files as published, and read by the recipe's own loader. A process
of its own trains, so that its peak is the step's; what Python and the libraries take before is told apart.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scripts.bench.result import Bar, Result

_SIDE = 1024
"""Pixels of the picture; the encoder sees 3/4 of them."""
_SMALL = {"c_cond": 512, "c_hidden": (1024, 1024), "num_heads": (16, 16), "blocks_down": (2, 6), "blocks_up": (6, 2)}
_SMALL_TEXT = {"num_hidden_layers": 4}
_WRITE = (
    "from scripts.bench.memory import write_weights; import sys; write_weights(sys.argv[1], full=sys.argv[2] == '1')"
)
_STEP = "from scripts.bench.memory import train_step; import sys; train_step(sys.argv[1])"


def run(*, full: bool, data: Path | None) -> Result:
    """Measure; `data` is not used. The full network takes 9 GB of disk for a while, and minutes on two cores."""
    with tempfile.TemporaryDirectory() as folder:
        _child(_WRITE, folder, "1" if full else "0")
        found = json.loads(_child(_STEP, folder).splitlines()[-1])
    training = found["step_peak_gigabytes"] - found["idle_gigabytes"]
    return Result(
        bench="memory",
        figures={
            "parameters_millions": found["parameters"] / 1e6,
            "peak_gigabytes": max(found["load_peak_gigabytes"], found["step_peak_gigabytes"]),
            "load_peak_gigabytes": found["load_peak_gigabytes"],
            "step_peak_gigabytes": found["step_peak_gigabytes"],
            "of_it_libraries_gigabytes": found["idle_gigabytes"],
            "planned_gigabytes": found["planned_gigabytes"],
            "planner_error_fraction": abs(found["planned_gigabytes"] / training - 1),
            "step_seconds": found["step_seconds"],
            "loss": found["loss"],
        },
        bars=[Bar("peak_gigabytes", at_most=20), Bar("planner_error_fraction", at_most=0.1)],
        full_size=full,
        peer="none",
        notes=["planned: against the step's peak less the libraries; weights are random: the loss need only be finite"],
    )


def _child(program: str, *arguments: str) -> str:
    # Freed gradients go back to the system only from maps of their own.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True, env=environment, check=True
    )
    return done.stdout


def write_weights(folder: str, *, full: bool) -> None:
    """Write random bf16 weights of a stage C network and its text model, and the demo's small image encoder."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    from scripts.demo_models.stage_c import make_stage_c_models
    from training.memory.architecture import CLIP_BIGG
    from training.stage_c.formats import save_stage_c
    from training.stage_c.network import StageCConfig, StageCNetwork
    from training.stage_c.text_files import save_text_model

    root = Path(folder)
    make_stage_c_models(root, seed=0)
    network = _random(lambda: StageCNetwork(StageCConfig() if full else StageCConfig(**_SMALL)))  # type: ignore[arg-type]
    save_stage_c(network, root / "network.safetensors")
    del network
    values = {**CLIP_BIGG, **({} if full else _SMALL_TEXT)}
    text = _random(lambda: CLIPTextModelWithProjection(CLIPTextConfig(**values)))
    save_text_model(text, root / "text.safetensors")


def _random(build: Callable[[], Any]) -> Any:
    with torch.device("meta"):
        module: nn.Module = build()
    module = module.to(torch.bfloat16).to_empty(device="cpu")
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            parameter.data.fill_(float("norm" in name and name.endswith("weight")))
        else:
            parameter.data.normal_(std=0.02)
    return module


def train_step(folder: str) -> None:
    """Train one step, and print what it took as JSON."""
    from scripts.bench.synthetic import BareRecorder, even_plan, random_batches
    from training.config import RunConfig
    from training.engines.choose import make_engine
    from training.loop import train_epoch
    from training.memory.report import memory_report
    from training.position import Position
    from training.trained import load_trained

    values: dict[str, Any] = {
        "name": "bench", "device": "cpu", "data": {"workspace": folder, "max_broken_fraction": 1.0},
        "batch": {"batch_size": 1, "micro_batch_size": 1}, "buckets": {"resolution": [_SIDE, _SIDE], "step": 64},
        "optimizer": {"name": "adafactor", "fused_backward": True, "max_grad_norm": 0.0},
        "schedule": {"name": "constant"},
        "precision": {"autocast": "bf16", "weights": "bf16", "rounding": "stochastic", "exact": False,
                      "num_threads": os.cpu_count()},
        "save": {"every_steps": 1_000_000}, "trackers": {"tensorboard": False},
        "stage_c": {
            "network": f"{folder}/network.safetensors", "text_encoder": f"{folder}/text.safetensors",
            "tokenizer": f"{folder}/tokenizer", "effnet": f"{folder}/effnet_encoder.safetensors",
            "train_text_encoder": True, "gradient_checkpointing": True,
        },
    }  # fmt: skip
    config = RunConfig.model_validate(values)
    planned = memory_report(config).own.peak(1)  # before the peak is looked at: networks are on the meta device
    idle = _resident_gigabytes()
    trained = load_trained(config, make_engine(config, device=torch.device("cpu"), exact=False))
    load_peak = _peak_gigabytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    plan = even_plan(config, num_samples=1, side=_SIDE)
    rows: list[dict[str, Any]] = []

    class Recorder(BareRecorder):
        def step_done(self, report: Any) -> None:
            rows.append(report.metrics())

    train_epoch(
        plan, random_batches(plan), position=Position(chunk=plan.chunk), config=config, trained=trained,
        recorder=Recorder(config, Path(folder) / "run"),
    )  # fmt: skip
    found = {
        "parameters": sum(parameter.numel() for parameter in trained.names),
        "step_peak_gigabytes": _peak_gigabytes(),
        "idle_gigabytes": idle,
        "load_peak_gigabytes": load_peak,
        "planned_gigabytes": planned / 1e9,
        "step_seconds": rows[0]["speed/step_seconds"],
        "loss": rows[0]["train/loss"],
    }
    print(json.dumps(found))


def _status_gigabytes(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(field))) * 1024 / 1e9


def _resident_gigabytes() -> float:
    return _status_gigabytes("VmRSS:")


def _peak_gigabytes() -> float:
    return _status_gigabytes("VmHWM:")
