"""A toy recipe with plan, batches and recorder: the loop without pictures, networks and files, in milliseconds."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from training.batch_plan import BatchPlan, make_batch_plan, rank_share
from training.buckets import BucketSettings
from training.chunk_data import Batch
from training.config import RunConfig
from training.engines.plain import PlainEngine
from training.loop import train_epoch
from training.optimizers import make_optimizer
from training.position import Position
from training.recipes.base import Loss
from training.stage_c.gdf import AdaptiveLossWeight
from training.step_report import StepReport
from training.trained import Trained


def toy_config(**changes: Any) -> RunConfig:
    """Settings of a toy run; changes: {section: {key: value}} or {key: value}."""
    values: dict[str, Any] = {
        "name": "toy", "seed": 3, "device": "cpu", "data": {"workspace": "none", "max_broken_fraction": 1.0},
        "batch": {"batch_size": 6, "micro_batch_size": 2}, "optimizer": {"learning_rate": 0.5, "max_grad_norm": 0.0},
        "schedule": {"name": "constant"}, "save": {"every_steps": 1000},
        "stage_c": {"network": "none", "text_encoder": "none", "effnet": "none"},
    }  # fmt: skip
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return RunConfig.model_validate(values)


def toy_plan(config: RunConfig, *, num_samples: int = 14) -> BatchPlan:
    """Samples of two shapes with loss weights 1, 2 and 3; the last step is short."""
    rows = range(num_samples)
    index = pa.table(
        {
            "key": [f"{row:04d}" for row in rows],
            "width": [64 if row % 3 else 128 for row in rows],
            "height": [64] * num_samples,
            "repeats": [1] * num_samples,
            "loss_weight": pa.array([1.0 + row % 3 for row in rows], pa.float32()),
        }
    )
    return make_batch_plan(
        index,
        bucket_settings=BucketSettings(resolution_area=64 * 128, step=64),
        micro_batch_size=config.batch.micro_batch_size,
        micro_batches_per_step=config.batch.micro_batches_per_step,
        seed=config.seed,
        epoch=0,
        chunk="toy/0000",
    )


def toy_batches(
    plan: BatchPlan, *, rank: int = 0, world_size: int = 1, first_step: int = 0, broken: tuple[str, ...] = ()
) -> Iterator[Batch]:
    """The rank's batches; pixels depend on the key only."""
    for step in plan.steps[first_step:]:
        for share in rank_share(step, rank=rank, world_size=world_size):
            samples = share.micro_batch.samples
            is_broken = [sample.key in broken for sample in samples]
            yield Batch(
                step=step.number,
                number=share.number,
                is_padding=share.is_padding,
                images=torch.stack([_pixels(sample.key) for sample in samples]),
                captions=[f"caption {sample.key}" for sample in samples],
                identities=[s.identity(seed=plan.seed, epoch=plan.epoch, chunk=plan.chunk) for s in samples],
                loss_weights=torch.tensor(
                    [
                        0.0 if share.is_padding or bad else s.loss_weight
                        for s, bad in zip(samples, is_broken, strict=True)
                    ]
                ),
                is_broken=torch.tensor(is_broken),
                broken=[] if share.is_padding else [(s.key, "bad") for s in samples if s.key in broken],
                datasets=["even" if int(sample.key) % 2 == 0 else "odd" for sample in samples],
                original_sizes=[(64, 64)] * len(samples),
                crops=[(0, 0)] * len(samples),
            )


def _pixels(key: str) -> Tensor:
    return torch.randint(0, 256, (3, 4, 4), generator=torch.Generator().manual_seed(int(key)), dtype=torch.uint8)


class ToyRecipe:
    """Predict a sample's mean colour. nan_keys: their loss is not a number."""

    def __init__(self, *, adaptive: bool = False, nan_keys: tuple[str, ...] = (), dropout: float = 0.0) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(48, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))
        self.adaptive = AdaptiveLossWeight() if adaptive else None
        self.nan_keys = nan_keys

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        rgb = batch.images.float() / 255
        per_sample = (model(rgb.flatten(1)) - rgb.mean(dim=(2, 3))).square().mean(dim=1)
        keys = [identity.key for identity in batch.identities]
        per_sample = torch.where(torch.tensor([key in self.nan_keys for key in keys]), torch.nan, per_sample)
        logsnr = torch.tensor([float(int(key) % 7 - 3) for key in keys])
        weights = torch.ones(len(keys)) if self.adaptive is None else self.adaptive.weight(logsnr)
        return Loss(per_sample, weights, {"logsnr": logsnr})

    def after_step(self, results: Any) -> None:
        if self.adaptive is not None:
            logsnr = torch.tensor([result.scalars["logsnr"] for result in results])
            self.adaptive.update(logsnr, torch.tensor([result.loss for result in results]))


class WatchedEngine(PlainEngine):
    """Remembers the gradients that every update was made with."""

    def __init__(self, accelerator: Accelerator, *, exact: bool) -> None:
        super().__init__(accelerator, exact=exact)
        self.gradients: list[list[Tensor]] = []

    def step(self) -> None:
        self.gradients.append([gradient.clone() for gradient in self._gradients()])
        super().step()


@dataclass
class ListRecorder:
    """Writes down what the loop tells. stop_at: ask to stop once so many steps are done."""

    stop_at: int | None = None
    stop_in_preview_at: int | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    traces: list[dict[str, Any]] = field(default_factory=list)
    events: list[tuple[Any, ...]] = field(default_factory=list)
    watched: list[int] = field(default_factory=list)

    def step_done(self, report: StepReport) -> None:
        self.rows.append(report.metrics())
        self.traces.append(report.trace())
        done = report.before.global_step
        if report.broken:
            self.events.append(("broken", done, list(report.broken)))
        if report.problem:
            self.events.append(("skipped", done, sorted(report.keys), report.problem, report.not_finite_keys))

    def save(self, position: Position) -> None:
        self.events.append(("save", position.global_step))

    def poll(self) -> None: ...

    def watch(self, position: Position) -> str:
        self.watched.append(position.global_step)
        return "asked in previews" if position.global_step == self.stop_in_preview_at else ""

    def stop_reason(self) -> str:
        return "asked" if self.stop_at is not None and len(self.rows) + 1 >= self.stop_at else ""


@dataclass
class ToyRun:
    """What came of a toy run on one rank."""

    position: Position
    reason: str
    gradients: list[list[Tensor]]
    weights: dict[str, Tensor]
    recorder: ListRecorder
    table: Tensor | None


def run_toy(
    config: RunConfig,
    *,
    exact: bool = True,
    adaptive: bool = False,
    broken: tuple[str, ...] = (),
    nan_keys: tuple[str, ...] = (),
    dropout: float = 0.0,
    stop_at: int | None = None,
    stop_in_preview_at: int | None = None,
    pass_over: tuple[int, ...] = (),
    position: Position | None = None,
    optimizer: str = "sgd",
) -> ToyRun:
    """Train the toy plan in this process, as one rank of however many there are."""
    position = position or Position(chunk="toy/0000")
    engine = WatchedEngine(Accelerator(cpu=True), exact=exact)
    recipe, recorder = (
        ToyRecipe(adaptive=adaptive, nan_keys=nan_keys, dropout=dropout),
        ListRecorder(stop_at, stop_in_preview_at),
    )
    rate = config.optimizer.learning_rate
    if optimizer == "sgd":
        groups = [{"params": list(recipe.module.parameters()), "lr": rate, "peak_rate": rate, "part": "network"}]
        made: torch.optim.Optimizer = torch.optim.SGD(groups)
    else:
        made = make_optimizer(
            optimizer, {"network": recipe.module.parameters()}, learning_rates={"network": rate},
            betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
        )  # fmt: skip
    plan = toy_plan(config)
    batches = toy_batches(plan, rank=engine.rank, world_size=engine.world_size, first_step=position.step, broken=broken)
    end, reason = train_epoch(
        plan, batches, position=position, config=config, recorder=recorder, pass_over=pass_over,
        trained=Trained(recipe, engine, engine.prepare(recipe.module, made), made, {}),  # type: ignore[arg-type]
    )  # fmt: skip
    table = None if recipe.adaptive is None else recipe.adaptive.state_dict()["losses"]
    weights = {name: tensor.detach().clone() for name, tensor in recipe.module.state_dict().items()}
    return ToyRun(end, reason, engine.gradients, weights, recorder, table)
