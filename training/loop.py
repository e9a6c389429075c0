"""The training loop: one epoch of a chunk from where its state stands to its end.

Owns the order of a step, the finite check, and when a state is saved. What is trained and how the loss is made is the
recipe's; how gradients come together is the engine's; what a step holds is the batch plan's; what is written down,
shown and drawn is the recorder's. To resume, call it again with the position of the loaded state: step k starts by
slicing the plan.

Every rank runs it, on its share of each step. What decides (numbers that are not finite, broken images, a request to
stop) is gathered first, so that all ranks do the same.
"""

import logging
import math
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

import torch

from sharding.images import is_too_broken
from training.batch_plan import BatchPlan, rank_share
from training.chunk_data import Batch
from training.config import RunConfig
from training.errors import BrokenDataError, NonFiniteError
from training.optimizers import set_rates
from training.position import Position
from training.randomness import step_seed
from training.recipes.base import SampleResult
from training.schedules import rate_factor
from training.step_report import StepReport
from training.step_results import Measured, gather_results
from training.trained import Trained

logger = logging.getLogger(__name__)


class Recorder(Protocol):
    """What the loop tells the outside, on every rank; only rank 0 writes."""

    def step_done(self, report: StepReport) -> None:
        """Take a finished step. Raises LossSpikeError when the run is to go back because of its loss."""

    def save(self, position: Position) -> None:
        """Save a state that continues at `position`."""

    def poll(self) -> None:
        """Do what waits for background work; called once a step."""

    def watch(self, position: Position) -> str:
        """Make the previews and the validation that are due; return why the ranks agreed to stop meanwhile, or ""."""

    def stop_reason(self) -> str:
        """Return why this rank was asked to stop, or ""."""


def train_epoch(
    plan: BatchPlan,
    batches: Iterator[Batch],
    *,
    position: Position,
    config: RunConfig,
    trained: Trained,
    recorder: Recorder,
    pass_over: Collection[int] = (),
) -> tuple[Position, str]:
    """Train the steps of `plan` from position.step on; return the new position and why it stopped ("" at the end).

    batches: this rank's micro-batches from that step on, in plan order. pass_over: global steps, counted from 1, that
    are not tried (`chunk_run` went back because of them).

    Raises NonFiniteError, LossSpikeError, BrokenDataError; the last saved state stays intact.
    """
    engine, schedule, skipped_in_a_row = trained.engine, config.schedule.model_dump(), 0
    for step in plan.steps[position.step :]:
        started = time.monotonic()
        factor = rate_factor(**schedule, global_step=position.global_step)
        rates = set_rates(trained.optimizer, factor, global_step=position.global_step)
        is_tried = position.global_step + 1 not in pass_over

        # --- forward and backward, micro-batch by micro-batch ---
        share = rank_share(step, rank=engine.rank, world_size=engine.world_size)
        own: list[Measured] = []
        waited_seconds = 0.0
        for number, planned in enumerate(share):
            asked = time.monotonic()
            batch = next(batches)
            waited_seconds += time.monotonic() - asked
            assert (batch.step, batch.number, batch.is_padding) == (step.number, planned.number, planned.is_padding)
            if not is_tried:
                continue
            torch.manual_seed(step_seed(config.seed, position.global_step, batch.number))  # model dropout
            with engine.micro_batch(is_last=number == len(share) - 1):
                with engine.autocast():
                    losses = trained.recipe.loss(trained.model, batch)
                batch = batch.without(losses.broken)
                is_used = (~batch.is_broken & (not batch.is_padding)).to(losses.per_sample.device)
                weighted = losses.weights * batch.loss_weights.to(losses.weights.device) * losses.per_sample
                # where, not a product: 0 × NaN of an unused slot would be NaN
                engine.backward(torch.where(is_used, weighted, 0.0).sum() / step.num_images)
            if not batch.is_padding:
                own.append(Measured(batch, losses, weighted))

        # --- what happened on all ranks ---
        results = gather_results(engine, own, waited_seconds=waited_seconds, stop_reason=recorder.stop_reason())
        num_broken = len(results.broken)

        # --- update, or pass over the step ---
        if results.broken and results.samples:
            engine.scale_gradients(step.num_images / (step.num_images - num_broken))
        norm = engine.grad_norm() if is_tried else 0.0
        problem = _problem(results.samples, norm) if is_tried else "passed_over"
        if problem:
            engine.skip()
            skipped_in_a_row += is_tried
        else:
            if config.optimizer.max_grad_norm > 0:
                engine.clip(norm, config.optimizer.max_grad_norm)
            trained.update(results.samples)
            skipped_in_a_row = 0
        trained.step_over(position.global_step + 1)

        # --- tell ---
        seconds, before = time.monotonic() - started, position
        position = before.after_step(
            num_images=step.num_images, num_broken=num_broken, is_applied=not problem, seconds=seconds
        )
        report = StepReport(
            step, before, position, results.samples, results.broken, problem, rates, norm, seconds,
            results.waited_seconds,
        )  # fmt: skip
        recorder.step_done(report)
        logger.info("%s", report.log_line(plan))
        _check_limits(position, plan, config, skipped_in_a_row)

        # --- save, show, stop ---
        recorder.poll()
        is_last = position.step == len(plan.steps) and plan.epoch == config.data.epochs - 1  # the final state follows
        is_due = position.global_step % config.save.every_steps == 0 and not is_last
        if results.stop_reason or is_due:
            recorder.save(position)
        if results.stop_reason:
            return position, results.stop_reason  # what is due to be shown, the next launch makes first
        if not is_last and (reason := recorder.watch(position)):
            if not is_due:
                recorder.save(position)
            return position, reason
    return position, ""


def _problem(results: Sequence[SampleResult], norm: float) -> str:
    if not results:
        return "no_image"
    is_finite = math.isfinite(norm) and all(math.isfinite(result.weighted_loss) for result in results)
    return "" if is_finite else "not_finite"


def _check_limits(position: Position, plan: BatchPlan, config: RunConfig, skipped_in_a_row: int) -> None:
    if skipped_in_a_row > config.max_skipped_steps:
        steps = range(position.global_step - skipped_in_a_row + 1, position.global_step + 1)
        raise NonFiniteError(
            f"{position.chunk} step {position.step}: {skipped_in_a_row} steps in a row without a finite update "
            f"(max_skipped_steps {config.max_skipped_steps}); the last saved state is intact. Lower the learning rate, "
            "or look at the skipped keys in the ledger",
            steps,
        )
    num_images = plan.num_images * config.data.epochs
    allowed = config.data.max_broken_fraction
    if is_too_broken(position.chunk_images_broken, num_images, max_broken_fraction=allowed):
        raise BrokenDataError(
            f"{position.chunk}: {position.chunk_images_broken:,} of {num_images:,} images could not be read "
            f"(max_broken_fraction {allowed}); run `python -m sharding verify`"
        )
