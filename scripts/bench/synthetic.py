"""A step of training without files of pictures: random batches of a plan, and a recorder that saves nothing."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import torch

from training.batch_plan import BatchPlan, rank_share
from training.chunk_data import Batch
from training.config import RunConfig
from training.ledger import Ledger
from training.plans import batch_plan
from training.position import Position
from training.records import Records
from training.run_dir import RunDir
from training.step_report import StepReport
from training.stop import StopRequest


class BareRecorder:
    """Writes what rank 0 of a run writes each step; saves nothing."""

    def __init__(self, config: RunConfig, root: Path) -> None:
        run_dir = RunDir(root)
        root.mkdir(parents=True)
        self._records = Records(config, run_dir, Ledger.open(run_dir.ledger_path, guard=lambda: None))
        self._stop = StopRequest(run_dir.stop_requested)

    def step_done(self, report: StepReport) -> None:
        self._records.step_done(report)

    def save(self, position: Position) -> None:
        raise AssertionError("a bench saves nothing")

    def poll(self) -> None:
        self._records.feed_trackers()

    def watch(self, position: Position) -> str:
        return ""

    def stop_reason(self) -> str:
        return self._stop.poll()


def even_plan(config: RunConfig, *, num_samples: int, side: int) -> BatchPlan:
    """Return the plan of a chunk of square pictures."""
    index = pa.table(
        {
            "key": [f"{number:016x}" for number in range(num_samples)],
            "width": [side] * num_samples,
            "height": [side] * num_samples,
            "repeats": [1] * num_samples,
            "loss_weight": pa.array([1.0] * num_samples, pa.float32()),
        }
    )
    return batch_plan(index, "bench/0000", config=config, epoch=0)


def random_batches(plan: BatchPlan) -> Iterator[Batch]:
    """Yield the batches of one process, with seeded noise for pixels."""
    generator = torch.Generator().manual_seed(0)
    for step in plan.steps:
        for share in rank_share(step, rank=0, world_size=1):
            samples, bucket = share.micro_batch.samples, share.micro_batch.bucket
            shape = (len(samples), 3, bucket.height, bucket.width)
            yield Batch(
                step=step.number, number=share.number, is_padding=False,
                images=torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8),
                captions=["1girl, long hair, sky"] * len(samples),
                identities=[s.identity(seed=0, epoch=0, chunk=plan.chunk) for s in samples],
                loss_weights=torch.ones(len(samples)), is_broken=torch.zeros(len(samples), dtype=torch.bool),
                broken=[], datasets=["bench"] * len(samples),
                original_sizes=[(bucket.width, bucket.height)] * len(samples),
                crops=[(0, 0)] * len(samples),
            )  # fmt: skip
