"""Estimates of one network: what a strategy takes on one rank, while it loads and while it trains.

planned = max(load peak, step peak). What a state costs in host memory while it is saved is `host_bytes`'.
"""

from dataclasses import dataclass
from math import prod

from training.buckets import Bucket, listed_buckets
from training.config import RunConfig
from training.memory.activations import PassBytes, pass_bytes
from training.memory.architecture import Architecture, Pass, shapes_of
from training.memory.strategies import Fixed, Strategy, fixed_bytes, update_bytes
from training.plans import bucket_settings

CARDS_GIB = (8, 10, 12, 16, 24, 48, 80)
ALLOWANCE_BYTES, ALLOWANCE_FRACTION = 600_000_000, 0.05
"""Of a card, for the driver's context and kernels' workspaces, and for what the allocator cannot use."""
MICRO_BATCH_SIZES = (1, 2, 4, 8, 16)
_SHARDINGS = {"auto": "ddp", "single": "none", "ddp": "ddp", "zero1": "zero1", "zero2": "zero2", "zero3": "zero3"}


def room_bytes(card_bytes: int) -> float:
    """Return what a card has for us."""
    return card_bytes * (1 - ALLOWANCE_FRACTION) - ALLOWANCE_BYTES


def strategy_of(config: RunConfig, *, num_processes: int) -> Strategy:
    """Return what a run.toml says, on so many processes."""
    parallel = config.parallel
    sharding = _SHARDINGS.get(parallel.strategy) or ("fsdp_hybrid" if parallel.shard == "hybrid" else "fsdp")
    return Strategy(
        "this run",
        optimizer=config.optimizer.name,
        weights=config.precision.weights,
        kahan=config.precision.weight_rounding == "kahan",
        autocast=config.precision.autocast != "no",
        fused_backward=config.optimizer.fused_backward,
        sharding=sharding if num_processes > 1 else "none",  # type: ignore[arg-type]
        num_ranks=num_processes,
        whole_gradients=parallel.gradients_meet == "step",
        offload={"none": "none", "optimizer": "optimizer", "optimizer_and_weights": "all"}[parallel.offload],  # type: ignore[arg-type]
        ema=("host" if config.ema.device == "cpu" else "device") if config.ema.enabled else "no",
        checkpointing=config.recipe.gradient_checkpointing,
        accumulates=config.batch.micro_batches_per_step > num_processes,
        device="cpu" if config.device == "cpu" else "gpu",
    )


@dataclass(frozen=True)
class Estimate:
    """A strategy's memory on one rank, in bytes on the device."""

    strategy: Strategy
    fixed: Fixed
    activations: PassBytes
    load_peak: int
    """While networks are loaded and handed to the optimizer."""

    def step_peak(self, micro_batch_size: int) -> int:
        """Return the worst moment of a step."""
        passing = self.activations.extra(micro_batch_size)
        return self.fixed.total + max(passing, self.fixed.update)

    def peak(self, micro_batch_size: int) -> int:
        """Return the worst moment of all."""
        return max(self.load_peak, self.step_peak(micro_batch_size))

    def largest_micro_batch(self, card_bytes: int) -> int:
        """Return how many images fit on a card; 0 when not even one does."""
        room = room_bytes(card_bytes)
        return max((size for size in MICRO_BATCH_SIZES if self.peak(size) <= room), default=0)

    def smallest_card(self, micro_batch_size: int) -> int | None:
        """Return the smallest card, in GiB, that so many images fit on; None when there is none."""
        return next((gib for gib in CARDS_GIB if self.largest_micro_batch(gib << 30) >= micro_batch_size), None)


class Planner:
    """Estimates for one network and bucket; each kind of pass is measured once."""

    def __init__(self, architecture: Architecture, bucket: Bucket, *, max_tokens: int) -> None:
        self.architecture = architecture
        self.bucket = bucket
        self._windows = max_tokens // 75
        self.shapes = shapes_of(architecture)
        self._passes: dict[Pass, PassBytes] = {}

    def estimate(self, strategy: Strategy) -> Estimate:
        """Return what a strategy takes on one rank."""
        is_fused = strategy.fused_backward
        wanted = Pass(
            width=self.bucket.width,
            height=self.bucket.height,
            num_windows=self._windows,
            weights="bf16" if strategy.computes_from_16_bit else "fp32",
            autocast=strategy.autocast,
            checkpointing=strategy.checkpointing,
            gradients="released" if is_fused else "kept" if strategy.accumulates else "grown",
            update_bytes=update_bytes(strategy) if is_fused else 0,
            device=strategy.device,
        )
        if wanted not in self._passes:
            self._passes[wanted] = pass_bytes(self.architecture, wanted)
        fixed = self.fixed(strategy)
        return Estimate(strategy, fixed, self._passes[wanted], self._load_peak(strategy, fixed))

    def fixed(self, strategy: Strategy) -> Fixed:
        """Return what does not depend on the micro-batch."""
        return fixed_bytes(
            strategy,
            self.shapes.trained,
            beside_elements=sum(map(prod, self.shapes.beside.values())),
            frozen_bytes=self.shapes.frozen_bytes,
            largest_unit_elements=self._largest_unit(),
        )

    def same_as(self, other: "Planner") -> bool:
        """Tell whether passes measured for another network are right for this one, too."""
        mine, theirs = ((p.architecture.key(), p.shapes, p.bucket, p._windows) for p in (self, other))
        return mine == theirs

    def _load_peak(self, strategy: Strategy, fixed: Fixed) -> int:
        """Whole networks, before they are cut into parts; fp16 is cast from fp32 when all are there.

        Tensors are read one by one into memory of their own: on a CPU the largest is there twice when it is cast.
        """
        shapes = [*self.shapes.trained.values(), *self.shapes.beside.values()]
        size = 2 if strategy.weights == "bf16" else 4
        reading = 2 * max(map(prod, shapes)) if strategy.device == "cpu" else 0
        return size * sum(map(prod, shapes)) + fixed.frozen + max(reading, fixed.ema)

    def _largest_unit(self) -> int:
        """Elements of the largest block; blocks are what FSDP and ZeRO-3 gather."""
        units: dict[str, int] = {}
        for name, shape in self.shapes.trained.items():
            # network.down_blocks.0.5.…: a block is up to the second number; a token embedding is its own
            parts = name.split(".")
            numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
            unit = ".".join(parts[: numbers[1] + 1] if len(numbers) > 1 else parts)
            units[unit] = units.get(unit, 0) + shape.numel()
        return max(units.values())


def largest_bucket(config: RunConfig) -> Bucket:
    """Return the bucket with the most pixels; of `no_upscale`, which has no list, the square."""
    settings = bucket_settings(config)
    side = settings.side // settings.step * settings.step
    return max(listed_buckets(settings) or [Bucket(side, side)], key=lambda b: (b.width * b.height, b))
