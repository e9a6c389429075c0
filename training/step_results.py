"""What became of a step's images: brought from the devices of all ranks into plan order, the same on every rank."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from training.chunk_data import Batch
from training.engines.base import Engine
from training.recipes.base import Loss, SampleResult


class Measured(NamedTuple):
    """A micro-batch whose numbers are still on the device."""

    batch: Batch
    losses: Loss
    weighted: Tensor
    """(B,) loss of each sample, with all its weights."""


class StepResults(NamedTuple):
    """One step over all ranks."""

    samples: list[SampleResult]
    """Of the images that were read, in plan order."""
    broken: list[tuple[str, str]]
    """(key, reason) of images that failed, by key."""
    waited_seconds: float
    """For images, on the rank that waited longest."""
    stop_reason: str
    """Why one of the ranks was asked to stop, or ""."""


class _RankResults(NamedTuple):
    by_micro_batch: list[tuple[int, list[SampleResult]]]
    broken: list[tuple[str, str]]
    waited_seconds: float
    stop_reason: str


def gather_results(engine: Engine, own: Sequence[Measured], *, waited_seconds: float, stop_reason: str) -> StepResults:
    """Return the results of all ranks; each calls it once a step with what it did itself."""
    broken = [image for measured in own for image in measured.batch.broken]
    ranks = engine.gather(_RankResults(_on_cpu(own), broken, waited_seconds, stop_reason))
    in_plan_order = sorted((part for rank in ranks for part in rank.by_micro_batch), key=lambda part: part[0])
    return StepResults(
        samples=[sample for _, samples in in_plan_order for sample in samples],
        broken=sorted(image for rank in ranks for image in rank.broken),
        waited_seconds=max(rank.waited_seconds for rank in ranks),
        stop_reason=next((rank.stop_reason for rank in ranks if rank.stop_reason), ""),
    )


def _on_cpu(own: Sequence[Measured]) -> list[tuple[int, list[SampleResult]]]:
    """Bring a step's numbers to the CPU in one transfer; broken slots are left out. Returns them by micro-batch."""
    names = sorted(own[0].losses.scalars) if own else []
    columns = [
        column.detach().double()
        for measured in own
        for column in (
            measured.losses.per_sample,
            measured.weighted,
            *(measured.losses.scalars[name] for name in names),
        )
    ]
    on_device = [column for column in columns if column.device.type != "cpu"]
    moved = iter(torch.split(torch.cat(on_device).cpu(), list(map(len, on_device))) if on_device else ())
    values = iter([column if column.device.type == "cpu" else next(moved) for column in columns])
    return [
        (measured.batch.number, _samples(measured.batch, [next(values) for _ in range(2 + len(names))], names))
        for measured in own
    ]


def _samples(batch: Batch, columns: Sequence[Tensor], names: Sequence[str]) -> list[SampleResult]:
    """columns: loss, weighted loss and the scalars of these names, (B,) each, on the CPU."""
    rows = torch.stack(list(columns), dim=1).tolist()
    slots = zip(batch.identities, batch.datasets, batch.captions, rows, batch.is_broken.tolist(), strict=True)
    return [
        SampleResult(identity.key, dataset, caption, row[0], row[1], dict(zip(names, row[2:], strict=True)))
        for identity, dataset, caption, row, is_broken in slots
        if not is_broken
    ]
