"""What loading and training take in a process of its own: peak resident memory, seconds; and what was planned for it.

The child first trains one step of the demo's toy networks, so that libraries, threads and kernels' code are there
before the count begins: what is reported is above that. It reads weights by the recipe's own loader, and trains by the
loop's own code. Linux only: the peak is started anew through /proc. Run by `memory` and `full_size`, not by hand.
"""

import ctypes
import gc
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scripts.bench.synthetic import BareRecorder, even_plan, random_batches

_BLOCK = 999_983  # a prime: rows of matrices differ
NETWORK, TEXT, TOY = "network.safetensors", "text.safetensors", "toy"


@dataclass(frozen=True)
class Measured:
    """Bytes above what the process held before."""

    num_parameters: int
    """Trained."""
    idle_bytes: int
    """Held before, by libraries; not counted in the others."""
    load_peak_bytes: int
    step_peak_bytes: int
    step_seconds: float
    """Of the last step."""
    loss: float


def write_weights(folder: Path, *, network: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    """Write random bf16 weights of a stage C network and its text model, and the demo's toys beside.

    network: what differs from the 3.6 B model; text: what differs from CLIP bigG.
    """
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    from scripts.demo_models.stage_c import make_stage_c_models
    from training.memory.stage_c_architecture import CLIP_BIGG
    from training.stage_c.formats import save_stage_c
    from training.stage_c.network import StageCConfig, StageCNetwork
    from training.stage_c.text_files import save_text_model

    make_stage_c_models(folder / TOY, seed=0)
    save_stage_c(_random(lambda: StageCNetwork(StageCConfig(**network))), folder / NETWORK)
    model = _random(lambda: CLIPTextModelWithProjection(CLIPTextConfig(**(CLIP_BIGG | dict(text)))))
    save_text_model(model, folder / TEXT)


def _random(build: Callable[[], Any]) -> Any:
    with torch.device("meta"):
        module: nn.Module = build()
    module = module.to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    block = (torch.randn(_BLOCK, generator=generator) * 0.02).bfloat16()
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            parameter.data.fill_(float("norm" in name and name.endswith("weight")))
        else:  # the same numbers again and again: billions of new ones would take minutes
            for part in torch.split(parameter.data.view(-1), _BLOCK):
                part.copy_(block[: len(part)])
    return module


def run_values(
    folder: Path, *, side: int, num_threads: int, micro_batch_size: int = 1, num_micro_batches: int = 1
) -> dict[str, Any]:
    """Return the settings of a run on those weights, as nested tables; side: pixels that the encoder sees."""
    return {
        "name": "bench", "device": "cpu", "data": {"workspace": str(folder), "max_broken_fraction": 1.0},
        "batch": {"batch_size": micro_batch_size * num_micro_batches, "micro_batch_size": micro_batch_size},
        "buckets": {"resolution": [side, side], "step": 64}, "schedule": {"name": "constant"},
        "precision": {"autocast": "no", "exact": False, "num_threads": num_threads}, "optimizer": {},
        "save": {"every_steps": 1_000_000}, "trackers": {"tensorboard": False},
        "stage_c": {
            "network": str(folder / NETWORK), "text_encoder": str(folder / TEXT),
            "effnet": str(folder / TOY / "effnet_encoder.safetensors"), "encode_scale": 1.0,
        },
    }  # fmt: skip


def measure(folder: Path, values: Mapping[str, Any], *, num_steps: int) -> Measured:
    """Load and train in a process of its own."""
    text = json.dumps({"values": values, "num_steps": num_steps})
    # Freed memory goes back to the system only from maps of their own: what is counted is then what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(folder)], input=text, stdout=subprocess.PIPE, text=True, env=environment,
        check=True,
    )  # fmt: skip
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Train what stands on standard input, and print what it took."""
    folder, wanted = Path(sys.argv[1]), json.load(sys.stdin)
    logging.disable(logging.WARNING)
    toy = json.loads(json.dumps(wanted["values"]))
    paths = folder / TOY
    toy["stage_c"] |= {"network": str(paths / "stage_c.safetensors"), "text_encoder": str(paths / "text_encoder")}
    _train(toy, paths / f"run-{os.getpid()}", num_steps=1)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    print(json.dumps(asdict(_train(wanted["values"], folder / f"run-{os.getpid()}", num_steps=wanted["num_steps"]))))


def _train(values: Mapping[str, Any], run_dir: Path, *, num_steps: int) -> Measured:
    from training.config import RunConfig
    from training.engines.choose import make_engine
    from training.loop import train_epoch
    from training.position import Position
    from training.precision import set_exact
    from training.trained import load_trained

    config = RunConfig.model_validate(values)
    set_exact(exact=False, num_threads=config.precision.num_threads)
    idle = status_bytes("VmRSS:")
    start_peak()
    trained = load_trained(config, make_engine(config, device=torch.device("cpu"), exact=False))
    load_peak = status_bytes("VmHWM:")
    side = config.buckets.resolution[0]
    plan = even_plan(config, num_samples=num_steps * config.batch.batch_size, side=side)
    rows: list[dict[str, Any]] = []

    class Recorder(BareRecorder):
        def step_done(self, report: Any) -> None:
            rows.append(report.metrics())

    start_peak()
    train_epoch(
        plan, random_batches(plan), position=Position(chunk=plan.chunk), config=config, trained=trained,
        recorder=Recorder(config, run_dir),
    )  # fmt: skip
    step_peak = status_bytes("VmHWM:")
    return Measured(
        num_parameters=sum(parameter.numel() for parameter in trained.names if parameter.requires_grad),
        idle_bytes=idle, load_peak_bytes=load_peak - idle, step_peak_bytes=step_peak - idle,
        step_seconds=rows[-1]["speed/step_seconds"], loss=rows[-1]["train/loss"],
    )  # fmt: skip


def start_peak() -> None:
    """Let VmHWM, the peak of resident memory, begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def status_bytes(field: str) -> int:
    """Return a size of this process, such as "VmRSS:" (now) or "VmHWM:" (the peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field))) * 1024


if __name__ == "__main__":
    main()
