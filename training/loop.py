"""The training loop: one chunk from where its state stands to its end.

Owns the order of a step, the finite check, counters, saving and tracking. What is trained and how the loss is made is
the recipe's; how gradients come together is the engine's; what a step holds is the batch plan's. To resume, call it
again with the position of the loaded state: step k starts by slicing the plan.
"""

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sharding.images import is_too_broken
from training.batch_plan import BatchPlan, Step, rank_share
from training.chunk_data import Batch
from training.config import RunConfig
from training.engines.plain import PlainEngine
from training.optimizers import rate_factor, set_rates
from training.randomness import step_seed
from training.recipes.base import Recipe, SampleResult

logger = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a non-finite loss or gradient."""


class BrokenDataError(ValueError):
    """More images of a chunk failed at run time than max_broken_fraction allows."""


@dataclass(frozen=True)
class Position:
    """Where a run stands: what a state's facts carry. All counters are absolute over the run."""

    chunk: str = ""
    epoch: int = 0
    step: int = 0
    """Next step of this epoch's plan."""
    global_step: int = 0
    """Position in the plan of the whole run; advances when a step is skipped."""
    applied_updates: int = 0
    images_seen: int = 0
    skipped_steps: int = 0
    broken_images: int = 0
    chunk_images_trained: int = 0
    chunk_images_skipped: int = 0
    chunk_images_broken: int = 0
    chunk_applied_updates: int = 0
    chunk_busy_seconds: float = 0.0
    """In steps; not in what a state is compared by."""


class Recorder(Protocol):
    """What the loop tells the outside, on every rank; only rank 0 writes."""

    def step_done(self, position: Position, metrics: Mapping[str, Any], trace: Mapping[str, Any]) -> None:
        """Take a finished step's metrics row and trace row; position: after it."""

    def skipped(self, position: Position, keys: Sequence[str], reason: str, not_finite_keys: Sequence[str]) -> None:
        """Take a step that was passed over without an update, and the images whose own loss was not finite."""

    def broken(self, position: Position, images: Sequence[tuple[str, str]]) -> None:
        """Take (key, reason) of images that failed at run time."""

    def save(self, position: Position) -> None:
        """Save a state that continues at `position`."""

    def poll(self) -> None:
        """Do what waits for background work; called once a step."""

    def preview(self, position: Position) -> None:
        """Make previews."""

    def stop_reason(self) -> str:
        """Return why this rank was asked to stop, or ""."""


def train_epoch(
    plan: BatchPlan,
    batches: Iterator[Batch],
    *,
    position: Position,
    config: RunConfig,
    recipe: Recipe,
    engine: PlainEngine,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recorder: Recorder,
) -> tuple[Position, str]:
    """Train the steps of `plan` from position.step on; return the new position and why it stopped ("" at the end).

    batches: this rank's micro-batches from that step on, in plan order.

    Raises NonFiniteError, BrokenDataError; the last saved state stays intact.
    """
    schedule, skipped_in_a_row = config.schedule, 0
    for step in plan.steps[position.step :]:
        started = time.monotonic()
        rates = set_rates(
            optimizer,
            rate_factor(
                schedule.name,
                global_step=position.global_step,
                warmup_steps=schedule.warmup_steps,
                total_steps=schedule.total_steps,
            ),
        )

        # --- forward and backward, micro-batch by micro-batch ---
        share = rank_share(step, rank=engine.rank, world_size=engine.world_size)
        own_results: list[tuple[int, list[SampleResult]]] = []
        own_broken: list[tuple[str, str]] = []
        is_finite, waited_seconds = True, 0.0
        for number, planned in enumerate(share):
            asked = time.monotonic()
            batch = next(batches)
            waited_seconds += time.monotonic() - asked
            assert (batch.step, batch.number, batch.is_padding) == (step.number, planned.number, planned.is_padding)
            torch.manual_seed(step_seed(config.seed, position.global_step, batch.number))  # model dropout
            with engine.autocast():
                losses = recipe.loss(model, batch)
            is_used = (~batch.is_broken & (not batch.is_padding)).to(losses.per_sample.device)
            weighted = losses.weights * batch.loss_weights.to(losses.weights.device) * losses.per_sample
            # where, not a product: 0 × NaN of an unused slot would be NaN
            loss = torch.where(is_used, weighted, 0.0).sum() / step.num_images
            engine.backward(loss, is_last=number == len(share) - 1)
            if not batch.is_padding:
                is_finite = is_finite and bool(torch.isfinite(loss))
                own_results.append((batch.number, _results(batch, losses.per_sample, weighted, losses.scalars)))
                own_broken += batch.broken

        # --- what happened on all ranks, in plan order ---
        gathered = engine.gather((own_results, own_broken, is_finite, waited_seconds, recorder.stop_reason()))
        results = [r for _, part in sorted((p for g in gathered for p in g[0]), key=lambda p: p[0]) for r in part]
        broken = sorted(image for rank in gathered for image in rank[1])
        stop_reason = next((rank[4] for rank in gathered if rank[4]), "")

        # --- update, or pass over the step ---
        if broken and results:
            engine.scale_gradients(step.num_images / (step.num_images - len(broken)))
        norm = engine.grad_norm()
        problem = ""
        if not results:
            problem = "no_image"
        elif not (all(rank[2] for rank in gathered) and math.isfinite(norm)):
            problem = "not_finite"
        if problem:
            engine.skip()
            skipped_in_a_row += 1
        else:
            if config.optimizer.max_grad_norm > 0:
                engine.clip(norm, config.optimizer.max_grad_norm)
            engine.step()
            recipe.after_step(results)
            skipped_in_a_row = 0
        seconds = time.monotonic() - started
        done = position
        position = _advance(position, step, is_applied=not problem, num_broken=len(broken), seconds=seconds)

        # --- tell ---
        if broken:
            recorder.broken(done, broken)
        if problem:
            keys = [sample.key for micro_batch in step.micro_batches for sample in micro_batch.samples]
            recorder.skipped(done, keys, problem, [r.key for r in results if not math.isfinite(r.loss)])
        metrics = _metrics(
            position, results, rates=rates, norm=norm, seconds=seconds, waited_seconds=max(g[3] for g in gathered)
        ) | {"data/broken": len(broken), "train/skipped": int(bool(problem))}
        recorder.step_done(position, metrics, _trace(done, step, results, rates))
        _log_step(plan, position, metrics)
        _check_limits(position, plan, config, skipped_in_a_row)

        # --- save, preview, stop ---
        recorder.poll()
        is_last = position.step == len(plan.steps) and plan.epoch == config.data.epochs - 1  # the final state follows
        if stop_reason or (position.global_step % config.save.every_steps == 0 and not is_last):
            recorder.save(position)
        if stop_reason:
            return position, stop_reason
        every = config.preview.every_steps
        if every and position.global_step % every == 0 and not is_last:
            recorder.preview(position)
    return position, ""


def _results(batch: Batch, per_sample: Tensor, weighted: Tensor, scalars: Mapping[str, Tensor]) -> list[SampleResult]:
    """Bring a micro-batch's numbers to the CPU in one transfer; broken slots are left out."""
    names = sorted(scalars)
    columns = [per_sample, weighted, *(scalars[name].to(per_sample.device) for name in names)]
    rows = torch.stack([column.detach().double() for column in columns], dim=1).cpu().tolist()
    return [
        SampleResult(identity.key, dataset, caption, row[0], row[1], dict(zip(names, row[2:], strict=True)))
        for identity, dataset, caption, row, is_broken in zip(
            batch.identities, batch.datasets, batch.captions, rows, batch.is_broken.tolist(), strict=True
        )
        if not is_broken
    ]


def _advance(position: Position, step: Step, *, is_applied: bool, num_broken: int, seconds: float) -> Position:
    num_real = step.num_images - num_broken
    return replace(
        position,
        step=position.step + 1,
        global_step=position.global_step + 1,
        applied_updates=position.applied_updates + is_applied,
        images_seen=position.images_seen + (num_real if is_applied else 0),
        skipped_steps=position.skipped_steps + (not is_applied),
        broken_images=position.broken_images + num_broken,
        chunk_images_trained=position.chunk_images_trained + (num_real if is_applied else 0),
        chunk_images_skipped=position.chunk_images_skipped + (0 if is_applied else num_real),
        chunk_images_broken=position.chunk_images_broken + num_broken,
        chunk_applied_updates=position.chunk_applied_updates + is_applied,
        chunk_busy_seconds=round(position.chunk_busy_seconds + seconds, 3),
    )


def _metrics(
    position: Position,
    results: Sequence[SampleResult],
    *,
    rates: Mapping[str, float],
    norm: float,
    seconds: float,
    waited_seconds: float,
) -> dict[str, Any]:
    """Return the row of metrics.jsonl; position: after the step. `global_step` counts finished steps from 1, `step`
    is the step's number in its plan from 0.

    Sums run in plan order in double precision, so that they do not depend on the number of ranks. A value that is not
    finite is left out: JSON has no word for it.
    """
    count = max(len(results), 1)
    values = {
        "train/loss": sum(result.loss for result in results) / count,
        "train/weighted_loss": sum(result.weighted_loss for result in results) / count,
        "train/grad_norm": norm,
        "train/images_seen": position.images_seen,
        "speed/images_per_second": len(results) / max(seconds, 1e-9),
        "speed/step_seconds": seconds,
        "data/wait_seconds": waited_seconds,
        "data/wait_fraction": waited_seconds / max(seconds, 1e-9),
        **{f"lr/{part}": rate for part, rate in rates.items()},
    }
    for dataset in sorted({result.dataset for result in results}):
        losses = [result.loss for result in results if result.dataset == dataset]
        values[f"loss_by_dataset/{dataset}"] = sum(losses) / len(losses)
    for name in results[0].scalars if results else ():
        values[f"sample_mean/{name}"] = sum(result.scalars[name] for result in results) / count
    place = {
        "global_step": position.global_step,
        "chunk": position.chunk,
        "epoch": position.epoch,
        "step": position.step - 1,
    }
    return place | {name: value for name, value in values.items() if math.isfinite(value)}


def _trace(done: Position, step: Step, results: Sequence[SampleResult], rates: Mapping[str, float]) -> dict[str, Any]:
    """Return what was trained in a step: equal for an interrupted and an uninterrupted run, on any number of ranks."""
    planned = [
        [micro_batch.bucket.width, micro_batch.bucket.height, [sample.key for sample in micro_batch.samples]]
        for micro_batch in step.micro_batches
    ]
    return {
        "global_step": done.global_step + 1,
        "chunk": done.chunk,
        "epoch": done.epoch,
        "step": done.step,
        "planned": planned,
        "samples": [
            [
                result.key,
                result.caption,
                {name: _json(value) for name, value in result.scalars.items()},
                _json(result.loss),
            ]
            for result in results
        ],
        "rates": dict(rates),
    }


def _json(value: float) -> float | str:
    return value if math.isfinite(value) else repr(value)  # "nan": JSON has no word for it


def _log_step(plan: BatchPlan, position: Position, metrics: Mapping[str, Any]) -> None:
    left_seconds = (len(plan.steps) - position.step) * metrics["speed/step_seconds"]
    logger.info(
        "%s step %s of %s  global %s  images %s  loss %.4f  lr %.1e  %.2f img/s  data %.0f%%  eta %dm%02ds",
        position.chunk, f"{position.step:,}", f"{len(plan.steps):,}", f"{position.global_step:,}",
        f"{position.images_seen:,}", metrics.get("train/loss", math.nan), metrics.get("lr/network", math.nan),
        metrics["speed/images_per_second"], 100 * metrics["data/wait_fraction"],
        left_seconds // 60, left_seconds % 60,
    )  # fmt: skip


def _check_limits(position: Position, plan: BatchPlan, config: RunConfig, skipped_in_a_row: int) -> None:
    if skipped_in_a_row > config.max_skipped_steps:
        raise NonFiniteError(
            f"{position.chunk} step {position.step}: {skipped_in_a_row} steps in a row without a finite update "
            f"(max_skipped_steps {config.max_skipped_steps}); the last saved state is intact. Lower the learning rate, "
            "or look at the skipped keys in the ledger"
        )
    num_images = plan.num_images * config.data.epochs
    allowed = config.data.max_broken_fraction
    if is_too_broken(position.chunk_images_broken, num_images, max_broken_fraction=allowed):
        raise BrokenDataError(
            f"{position.chunk}: {position.chunk_images_broken:,} of {num_images:,} images could not be read "
            f"(max_broken_fraction {allowed}); run `python -m sharding verify`"
        )
