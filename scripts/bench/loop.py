"""A step of the training loop, records included, against forward, loss, backward and optimizer written out by hand.

Both train the same small stage C on the same batches in memory, in turns, so that a noisy machine disturbs both alike.
What the loop does besides (counters, gathering, the finite check, metrics, log line, stop file) costs milliseconds a
step whatever the network, so a small network is the hard case.
"""

import io
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scripts.bench.result import Bar, Result
from scripts.bench.synthetic import BareRecorder, even_plan, random_batches
from training.batch_plan import BatchPlan
from training.chunk_data import Batch
from training.config import RunConfig
from training.engines.choose import make_engine
from training.loop import train_epoch
from training.position import Position
from training.schedules import rate_factor
from training.trained import Trained, load_trained

_ROUNDS, _FULL_ROUNDS = 4, 12
_NUM_SAMPLES = 24
_SIDE = 256


def run(*, full: bool, data: Path | None) -> Result:
    """Measure; `data` is not used: pixels do not matter here."""
    logging.getLogger("training").setLevel(logging.INFO)
    logging.getLogger("training").addHandler(logging.StreamHandler(io.StringIO()))
    logging.getLogger("training").propagate = False
    with tempfile.TemporaryDirectory() as folder:
        config = _config(Path(folder))
        engine = make_engine(config, device=torch.device("cpu"), exact=False)
        trained = load_trained(config, engine)
        plan = even_plan(config, num_samples=_NUM_SAMPLES, side=_SIDE)
        batches = list(random_batches(plan))
        recorder = BareRecorder(config, Path(folder) / "run")

        def by_loop() -> None:
            train_epoch(
                plan, iter(batches), position=Position(chunk=plan.chunk), config=config, trained=trained,
                recorder=recorder,
            )  # fmt: skip

        ways: dict[str, Callable[[], None]] = {
            "loop": by_loop,
            "hand": lambda: _by_hand(plan, batches, config, trained),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range((_FULL_ROUNDS if full else _ROUNDS) + 1):
            for name in sorted(ways, reverse=bool(number % 2)):
                started = time.perf_counter()
                ways[name]()
                if number:  # the first round warms up
                    seconds[name].append((time.perf_counter() - started) / len(plan.steps))
    loop, hand = (statistics.median(seconds[name]) for name in ("loop", "hand"))
    ratios = [one / other for one, other in zip(seconds["loop"], seconds["hand"], strict=True)]
    return Result(
        bench="loop",
        figures={
            "hand_seconds_per_step": hand,
            "loop_seconds_per_step": loop,
            "overhead_ms_per_step": (loop - hand) * 1_000,
            "loop_to_hand_ratio": statistics.median(ratios),
        },
        bars=[Bar("loop_to_hand_ratio", at_most=1.05)],
        full_size=full,
        peer=f"the same recipe and optimizer by hand, torch {torch.__version__}",
        notes=[f"{len(plan.steps)} steps of 2 micro-batches of 2 pictures a round; the median of the rounds' ratios"],
    )


def _by_hand(plan: BatchPlan, batches: list[Batch], config: RunConfig, trained: Trained) -> None:
    remaining = iter(batches)
    parameters = [p for group in trained.optimizer.param_groups for p in group["params"]]
    for step in plan.steps:
        for group in trained.optimizer.param_groups:
            group["lr"] = group["peak_rate"] * rate_factor(**config.schedule.model_dump(), global_step=step.number)
        for _ in step.micro_batches:
            batch = next(remaining)
            losses = trained.recipe.loss(trained.model, batch)
            loss = (losses.weights * batch.loss_weights * losses.per_sample).sum() / step.num_images
            loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.max_grad_norm)
        trained.optimizer.step()
        trained.optimizer.zero_grad(set_to_none=True)


def _config(folder: Path) -> RunConfig:
    from scripts.demo_models.stage_c import make_stage_c_models

    make_stage_c_models(folder, seed=1)
    values: dict[str, Any] = {
        "name": "bench", "device": "cpu", "data": {"workspace": str(folder)},
        "batch": {"batch_size": 4, "micro_batch_size": 2},
        "buckets": {"resolution": [_SIDE, _SIDE], "step": 32}, "precision": {"autocast": "no"},
        "save": {"every_steps": 1_000_000}, "trackers": {"tensorboard": False},
        "stage_c": {
            "network": f"{folder}/stage_c.safetensors", "text_encoder": f"{folder}/text_encoder",
            "tokenizer": f"{folder}/tokenizer", "effnet": f"{folder}/effnet_encoder.safetensors", "encode_scale": 1.0,
        },
    }  # fmt: skip
    return RunConfig.model_validate(values)
