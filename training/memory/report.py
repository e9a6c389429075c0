"""`training plan --memory`: what a run takes on each card, and which settings and presets fit which card.

Weights, gradients and optimizer are counted from the real shapes, activations from the real networks on the meta
device; what the card's driver and the allocator need besides is an allowance. On a CPU it is compared with real
processes by `python -m scripts.bench memory`; nothing was measured on a GPU here.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sharding.config import load_config
from sharding.files import size_text
from training.buckets import Bucket
from training.config import RunConfig
from training.memory.architecture import architecture_of, shapes_of
from training.memory.planner import CARDS_GIB, Estimate, Planner, largest_bucket, room_bytes, strategy_of
from training.memory.strategies import catalogue, optimizer_state_bytes

_GB = 1e9
_TERAFLOPS = 100
"""Of bf16 products, that a card is taken to do per second; not measured here."""
_PRESETS = Path(__file__).parents[2] / "configs" / "training"


_STATED = re.compile(
    r"^# Hardware: (?:(?P<machines>\d+) x )?(?P<cards>\d+) x \d+ GB\.\n"
    r"# Memory per card, planned: (?P<load>[\d.]+) GB while loading, (?P<step>[\d.]+) GB in a step of micro-batch "
    r"(?P<size>\d+)\.$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class StatedMemory:
    """What a preset says of itself; a test compares it with the planner. Bytes of one card."""

    load_peak: float
    step_peak: float
    micro_batch_size: int
    num_cards: int

    @classmethod
    def of_file(cls, path: Path) -> "StatedMemory":
        """Read it from a preset's head. Raises ValueError where a preset does not state it."""
        found = _STATED.search(path.read_text(encoding="utf-8"))
        if found is None:
            raise ValueError(f"{path}: states no hardware and memory as the others do")
        cards = int(found["machines"] or 1) * int(found["cards"])
        return cls(_GB * float(found["load"]), _GB * float(found["step"]), int(found["size"]), cards)

    def smallest_card(self) -> int | None:
        """Return the smallest card, in GiB, that it fits on; None when there is none."""
        return next((gib for gib in CARDS_GIB if max(self.load_peak, self.step_peak) <= room_bytes(gib << 30)), None)


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
    presets: Mapping[str, "StatedMemory"]
    """Presets of this repository, by what they state."""

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
        lines += ["", f"{'preset of configs/training':<36} {'load':>7} {'step':>6}  GB per card; fits"]
        lines += [_preset_row(name, stated) for name, stated in self.presets.items()]
        lines.append("arithmetic and meta-device measurements; no GPU was used")
        return "\n".join(lines)

    def values(self) -> dict[str, Any]:
        """Return the same as plain data, in bytes."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        values["own"]["peak"] = self.own.peak(self.micro_batch_size)
        return values


def memory_report(config: RunConfig, *, num_processes: int = 1) -> MemoryReport:
    """Return the memory of a run and of the alternatives. Takes under a minute for the 3.6 B network."""
    architecture = architecture_of(config)
    planner = Planner(architecture, largest_bucket(config), max_tokens=config.recipe.max_tokens)
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
        presets={path.stem: StatedMemory.of_file(path) for path in presets()},
    )


def state_bytes(config: RunConfig) -> tuple[int, str]:
    """Return the size of a saved state, and what is in it."""
    architecture = architecture_of(config)
    shapes = shapes_of(architecture)
    trained = sum(shape.numel() for shape in shapes.trained.values())
    elements = trained + sum(shape.numel() for shape in shapes.beside.values())
    precision, name = config.precision, config.optimizer.name
    size = 4 if precision.weights == "fp32" else 2
    optimizer = optimizer_state_bytes(name, list(shapes.trained.values()))
    optimizer += 2 * trained * (precision.weight_rounding == "kahan")
    ema = 4 * trained * config.ema.enabled
    note = f"{elements:,} {precision.weights} weights {size_text(size * elements)}, {name} {size_text(optimizer)}"
    note += f", EMA {size_text(ema)}" * config.ema.enabled
    return size * elements + optimizer + ema, "; ".join([note, *(f"not here: {name}" for name in architecture.assumed)])


def preset_estimate(path: Path, planners: list[Planner]) -> tuple[int, Estimate]:
    """Return a preset's micro-batch size, and its estimate on as many processes as its command names.

    planners: whose passes are used again where networks and bucket are the same; gets a new one where none is.
    """
    preset = load_config(path, RunConfig, [])
    own = Planner(architecture_of(preset), largest_bucket(preset), max_tokens=preset.recipe.max_tokens)
    processes = re.search(r"--processes (\d+)", path.read_text(encoding="utf-8"))
    strategy = strategy_of(preset, num_processes=int(processes[1]) if processes else 1)
    chosen = next((planner for planner in planners if own.same_as(planner)), own)
    if chosen is own:
        planners.append(own)
    return preset.batch.micro_batch_size, chosen.estimate(strategy)


def preset_note(size: int, estimate: Estimate) -> tuple[str, str]:
    """Return what a preset says of its memory and time: two lines without their comment signs."""
    load, step = estimate.load_peak / _GB, estimate.step_peak(size) / _GB
    tera = estimate.activations.flops_per_image / 1e12
    return (
        f"Memory per card, planned: {load:.1f} GB while loading, {step:.1f} GB in a step of micro-batch {size}.",
        f"Time: {tera:.1f} TFLOP an image, {_TERAFLOPS / tera:.1f} images a second and card at {_TERAFLOPS} TFLOP/s "
        "(a third of an A100's peak).",
    )


def presets() -> list[Path]:
    """Return the files of configs/training that are for a GPU."""
    return [path for path in sorted(_PRESETS.glob("*.toml")) if load_config(path, RunConfig, []).device != "cpu"]


def _breakdown(estimate: Estimate, size: int) -> list[str]:
    fixed, passing = estimate.fixed, estimate.activations
    parts = {
        "weights": fixed.weights, "fp32 master weights": fixed.master, "gradients": fixed.gradients,
        "optimizer": fixed.optimizer, "EMA": fixed.ema, "frozen networks": fixed.frozen, "buffers": fixed.buffers,
        "casts, activations, updates": max(passing.extra(size), fixed.update),
        "peak of a step": estimate.step_peak(size), "peak while loading": estimate.load_peak,
        "in host memory besides": fixed.host,
    }  # fmt: skip
    return [f"  {name:<28} {size_text(number):>11}" for name, number in parts.items() if number]


def _row(estimate: Estimate) -> str:
    fixed, passing = estimate.fixed, estimate.activations
    other = fixed.ema + fixed.frozen + fixed.buffers + passing.fixed
    smallest = estimate.smallest_card(1)
    ranks = f"{estimate.strategy.num_ranks} x " * (estimate.strategy.num_ranks > 1)
    return (
        f"{estimate.strategy.name:<36} {(fixed.weights + fixed.master) / _GB:>8.1f} {fixed.gradients / _GB:>6.1f}"
        f" {fixed.optimizer / _GB:>7.1f} {other / _GB:>6.1f} {passing.per_image / _GB:>8.2f}"
        f"  {f'{ranks}{smallest} GB' if smallest else 'no card'}"
    )


def _preset_row(name: str, stated: StatedMemory) -> str:
    smallest = stated.smallest_card()
    card = f"{stated.num_cards} x {smallest} GB" if smallest else f"no card of up to {CARDS_GIB[-1]} GB"
    load, step = stated.load_peak / _GB, stated.step_peak / _GB
    return f"  {name:<34} {load:>7.1f} {step:>6.1f}  {card}, micro-batch {stated.micro_batch_size}"


def _best(estimates: Sequence[Estimate], gib: int, *, many: bool) -> str:
    fitting = {
        estimate.strategy.name: size
        for estimate in estimates
        if (estimate.strategy.num_ranks > 1) == many and (size := estimate.largest_micro_batch(gib << 30))
    }
    return "; ".join(f"{name} (micro-batch {size})" for name, size in fitting.items()) or "nothing"
