"""`training plan --memory`: what a run takes on each card, and which settings fit which card. See `memory_text`.

Weights, gradients and optimizer are counted from the real shapes, activations from the real networks on the meta
device; what the card's driver and the allocator need besides is an allowance. Nothing was measured on a GPU here.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sharding.config import load_config
from training.buckets import Bucket, listed_buckets
from training.config import RunConfig
from training.memory.activations import Pass, PassBytes, pass_bytes
from training.memory.architecture import Architecture, architecture_of, shapes_of
from training.memory.strategies import Fixed, Strategy, catalogue, fixed_bytes, optimizer_state_bytes
from training.plans import bucket_settings

CARDS_GIB = (8, 10, 12, 16, 24, 48, 80)
ALLOWANCE_BYTES, ALLOWANCE_FRACTION = 600_000_000, 0.05
"""Of a card, for the driver's context and kernels' workspaces, and for what the allocator cannot use."""
_GB = 1e9
_MICRO_BATCH_SIZES = (1, 2, 4, 8, 16)
_PRESETS = Path(__file__).parents[2] / "configs" / "training"


def strategy_of(config: RunConfig, *, num_processes: int) -> Strategy:
    """Return what a run.toml says, with the whole model on each process (DDP when there are several)."""
    ema = {"same": "device", "cpu": "host"}[config.ema.device] if config.ema.enabled else "no"
    return Strategy(
        "this run",
        optimizer=config.optimizer.name,
        weights=config.precision.weights,
        kahan=config.precision.weight_rounding == "kahan",
        autocast=config.precision.autocast != "no",
        fused_backward=config.optimizer.fused_backward,
        sharding="ddp" if num_processes > 1 else "none",
        num_ranks=num_processes,
        ema=ema,  # type: ignore[arg-type]
        checkpointing=config.stage_c.gradient_checkpointing,
    )


@dataclass(frozen=True)
class Estimate:
    """A strategy's memory on one rank."""

    strategy: Strategy
    fixed: Fixed
    activations: PassBytes

    def peak(self, micro_batch_size: int) -> int:
        """Return bytes on the device at the worst moment of a step."""
        passing = self.activations.extra(micro_batch_size)
        if self.strategy.fused_backward:
            return self.fixed.total + passing + self.fixed.update
        return self.fixed.total + max(passing, self.fixed.update)

    def largest_micro_batch(self, card_bytes: int) -> int:
        """Return how many images fit on a card; 0 when not even one does."""
        room = card_bytes * (1 - ALLOWANCE_FRACTION) - ALLOWANCE_BYTES
        return max((size for size in _MICRO_BATCH_SIZES if self.peak(size) <= room), default=0)


@dataclass(frozen=True)
class MemoryReport:
    """The run's own estimate, and those of the catalogue."""

    bucket: Bucket
    micro_batch_size: int
    num_processes: int
    num_trained: int
    num_frozen: int
    assumed: tuple[str, ...]
    own: Estimate
    others: tuple[Estimate, ...]
    presets: Mapping[str, tuple[int, Estimate]]
    """Presets of this repository: micro-batch size and estimate."""

    def text(self) -> str:
        """Return tables for people; sizes in GB of 10^9 bytes, cards in GiB as they are sold."""
        lines = [f"not here: {name}" for name in self.assumed]
        lines.append(
            f"{self.num_trained:,} parameters trained, {self.num_frozen:,} frozen; bucket {self.bucket},"
            f" micro-batch {self.micro_batch_size}, {self.num_processes} processes"
        )
        lines += _breakdown(self.own, self.micro_batch_size)
        lines += [
            "",
            f"{'per card, GB':<36} {'weights':>8} {'grads':>6} {'optim.':>7} {'other':>6} {'/ image':>8}  fits",
        ]
        lines += [_row(estimate) for estimate in self.others]
        lines += ["", "on a card of"]
        for gib in CARDS_GIB:
            lines.append(f"  {gib:>2} GB      {_best(self.others, gib, many=False)}")
        many = max(estimate.strategy.num_ranks for estimate in self.others)
        lines.append(f"  {many} x 80 GB  {_best(self.others, 80, many=True)}")
        for name, (size, estimate) in self.presets.items():
            smallest = _smallest_card(estimate, size)
            ranks = estimate.strategy.num_ranks
            card = f"fits {ranks} x {smallest} GB" if smallest else f"fits no card of up to {CARDS_GIB[-1]} GB"
            lines.append(f"preset {name}: {card} ({estimate.peak(size) / _GB:.1f} GB at micro-batch {size})")
        lines.append("arithmetic and meta-device measurements; no GPU was used")
        return "\n".join(lines)

    def values(self) -> dict[str, Any]:
        """Return the same as plain data, in bytes."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        values["own"]["peak"] = self.own.peak(self.micro_batch_size)
        return values


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
        wanted = Pass(
            width=self.bucket.width,
            height=self.bucket.height,
            num_windows=self._windows,
            weights="bf16" if strategy.computes_from_16_bit else "fp32",
            autocast=strategy.autocast,
            checkpointing=strategy.checkpointing,
            gradients="released" if strategy.fused_backward else "kept",
        )
        if wanted not in self._passes:
            self._passes[wanted] = pass_bytes(self.architecture, wanted)
        fixed = fixed_bytes(
            strategy,
            self.shapes.trained,
            frozen_bytes=self.shapes.frozen_bytes + 4 * sum(shape.numel() for shape in self.shapes.beside.values()),
            largest_unit_elements=self._largest_unit(),
        )
        return Estimate(strategy, fixed, self._passes[wanted])

    def same_as(self, other: "Planner") -> bool:
        """Tell whether passes measured for another network are right for this one, too."""
        mine, theirs = ((p.shapes, p.bucket, p._windows) for p in (self, other))
        return mine == theirs

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


def memory_report(config: RunConfig, *, num_processes: int = 1) -> MemoryReport:
    """Return the memory of a run and of the alternatives. Takes under a minute for the 3.6 B network."""
    architecture = architecture_of(config)
    planner = Planner(architecture, largest_bucket(config), max_tokens=config.stage_c.max_tokens)
    own = planner.estimate(strategy_of(config, num_processes=num_processes))
    others = tuple(map(planner.estimate, catalogue(max(num_processes, 8))))
    return MemoryReport(
        bucket=planner.bucket,
        micro_batch_size=config.batch.micro_batch_size,
        num_processes=num_processes,
        num_trained=sum(shape.numel() for shape in planner.shapes.trained.values()),
        num_frozen=planner.shapes.num_frozen,
        assumed=architecture.assumed,
        own=own,
        others=others,
        presets=_presets(planner),
    )


def memory_text(config: RunConfig, *, num_processes: int = 1) -> str:
    """Return the memory report as text."""
    return memory_report(config, num_processes=num_processes).text()


def state_bytes(config: RunConfig) -> tuple[int, str]:
    """Return the size of a saved state, and what is in it."""
    architecture = architecture_of(config)
    shapes = shapes_of(architecture)
    elements = sum(shape.numel() for shape in (*shapes.trained.values(), *shapes.beside.values()))
    precision, name = config.precision, config.optimizer.name
    size = 4 if precision.weights == "fp32" else 2
    optimizer = optimizer_state_bytes(name, list(shapes.trained.values()))
    optimizer += 2 * elements * (precision.weight_rounding == "kahan")
    ema = 4 * elements * config.ema.enabled
    note = f"{elements:,} {precision.weights} weights {size * elements / _GB:.2f} GB, {name} {optimizer / _GB:.2f} GB"
    note += f", EMA {ema / _GB:.2f} GB" * config.ema.enabled
    return size * elements + optimizer + ema, "; ".join([note, *(f"not here: {name}" for name in architecture.assumed)])


def largest_bucket(config: RunConfig) -> Bucket:
    """Return the bucket with the most pixels; of `no_upscale`, which has no list, the square."""
    settings = bucket_settings(config)
    side = settings.side // settings.step * settings.step
    return max(listed_buckets(settings) or [Bucket(side, side)], key=lambda b: (b.width * b.height, b))


def _presets(planner: Planner) -> dict[str, tuple[int, Estimate]]:
    """Estimate the presets of this repository, but not those for a CPU, each on as many cards as its command names."""
    found = {}
    for path in sorted(_PRESETS.glob("*.toml")):
        preset = load_config(path, RunConfig, [])
        if preset.device == "cpu":
            continue
        other = Planner(architecture_of(preset), largest_bucket(preset), max_tokens=preset.stage_c.max_tokens)
        processes = re.search(r"--processes (\d+)", path.read_text(encoding="utf-8"))
        strategy = strategy_of(preset, num_processes=int(processes[1]) if processes else 1)
        same = planner if other.same_as(planner) else other
        found[path.stem] = (preset.batch.micro_batch_size, same.estimate(strategy))
    return found


def _breakdown(estimate: Estimate, size: int) -> list[str]:
    fixed, passing = estimate.fixed, estimate.activations
    parts = {
        "weights": fixed.weights, "fp32 master weights": fixed.master, "gradients": fixed.gradients,
        "optimizer": fixed.optimizer, "EMA": fixed.ema, "frozen networks": fixed.frozen, "buffers": fixed.buffers,
        "casts and the like": passing.fixed, f"activations of {size} images": size * passing.per_image,
        "at the peak": estimate.peak(size), "in host memory": fixed.host,
    }  # fmt: skip
    return [f"  {name:<28} {number / _GB:>8.2f} GB" for name, number in parts.items() if number]


def _row(estimate: Estimate) -> str:
    fixed, passing = estimate.fixed, estimate.activations
    other = fixed.ema + fixed.frozen + fixed.buffers + passing.fixed
    smallest = _smallest_card(estimate, 1)
    ranks = f"{estimate.strategy.num_ranks} x " * (estimate.strategy.num_ranks > 1)
    return (
        f"{estimate.strategy.name:<36} {(fixed.weights + fixed.master) / _GB:>8.1f} {fixed.gradients / _GB:>6.1f}"
        f" {fixed.optimizer / _GB:>7.1f} {other / _GB:>6.1f} {passing.per_image / _GB:>8.2f}"
        f"  {f'{ranks}{smallest} GB' if smallest else 'no card'}"
    )


def _smallest_card(estimate: Estimate, size: int) -> int | None:
    return next((gib for gib in CARDS_GIB if estimate.largest_micro_batch(gib << 30) >= size), None)


def _best(estimates: Sequence[Estimate], gib: int, *, many: bool) -> str:
    fitting = {
        estimate.strategy.name: size
        for estimate in estimates
        if (estimate.strategy.num_ranks > 1) == many and (size := estimate.largest_micro_batch(gib << 30))
    }
    return "; ".join(f"{name} (micro-batch {size})" for name, size in fitting.items()) or "nothing"
