"""How a run may keep its weights, gradients and optimizer, and what that costs in bytes. Arithmetic, no torch.

Sources: Rajbhandari et al., "ZeRO", 2020 (what each stage splits); torch's FSDP2 and DeepSpeed's documentation for
what is gathered; the optimizers' own papers for their states. What one process takes is compared with real processes by
`python -m scripts.bench memory`; what is split over several is arithmetic only, as our engines set it up: fp32 weights
in DeepSpeed, whole networks in every process while they load.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

Sharding = Literal["none", "ddp", "fsdp", "fsdp_hybrid", "zero1", "zero2", "zero3"]
Shape = Sequence[int]

BLOCK_8BIT, SMALLEST_8BIT = 256, 4096
"""bitsandbytes: one fp32 scale per block and state; smaller tensors stay in fp32."""
ZERO_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's reduce_bucket_size."""

_STATES_PER_ELEMENT = {"adamw": 2, "adam": 2, "lion": 1, "sgd": 0, "schedule_free": 2, "prodigy": 4}
"""fp32 numbers per element; Prodigy keeps the first weights and s besides, schedule-free AdamW z and v."""
_8BIT = {"adamw8bit": 2, "adam8bit": 2, "lion8bit": 1}
_UPDATE_NUMBERS = {"adafactor": 2, "lion": 1}
"""fp32 numbers per element that an update takes for a moment: Adafactor's and its square, Lion's sign."""
OPTIMIZERS = (*_STATES_PER_ELEMENT, *_8BIT, "adafactor")


@dataclass(frozen=True)
class Strategy:
    """One way to train. Raises ValueError for what cannot be combined."""

    name: str
    optimizer: str = "adafactor"
    weights: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Format of the weights that are updated, and of their gradients."""
    kahan: bool = False
    """Keep what rounding to bf16 lost, in another bf16."""
    autocast: bool = True
    """16-bit compute."""
    fused_backward: bool = False
    """Update inside backward: one micro-batch a step, one process, no clipping."""
    sharding: Sharding = "none"
    num_ranks: int = 1
    ranks_per_node: int = 8
    """`fsdp_hybrid` splits within a node and copies across nodes."""
    whole_gradients: bool = True
    """FSDP2: while a step has further micro-batches, every process holds whole gradients."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """ZeRO: optimizer and fp32 weights in host memory; `all`: the weights of the forward, too (ZeRO-3)."""
    ema: Literal["no", "device", "host"] = "no"
    """A second set of fp32 weights."""
    checkpointing: bool = True
    accumulates: bool = True
    """A step has several micro-batches: gradients are there while a later one is computed."""
    device: Literal["gpu", "cpu"] = "gpu"

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"memory: optimizer {self.optimizer!r} is not one of {', '.join(OPTIMIZERS)}")
        if self.fused_backward and (self.num_ranks > 1 or self.sharding != "none"):
            raise ValueError(f"memory: {self.name}: fused backward works in one process only")
        if self.offload != "none" and not self.sharding.startswith("zero"):
            raise ValueError(f"memory: {self.name}: offload is DeepSpeed's; sharding is {self.sharding}")
        if self.offload == "all" and self.sharding != "zero3":
            raise ValueError(f"memory: {self.name}: only zero3 can put the forward's weights in host memory")

    @property
    def computes_from_16_bit(self) -> bool:
        """Whether the forward reads 16-bit weights, not casts of fp32 ones."""
        return self.weights != "fp32" or (self.autocast and self.sharding.startswith("fsdp"))


def catalogue(num_ranks: int) -> tuple[Strategy, ...]:
    """Return the strategies that the table compares: on one card, and split over `num_ranks` of one machine."""
    one = [
        Strategy("fp32, AdamW", optimizer="adamw"),
        Strategy("fp32, 8-bit AdamW", optimizer="adamw8bit"),
        Strategy("fp32, Adafactor"),
        Strategy("bf16, AdamW", weights="bf16", optimizer="adamw"),
        Strategy("bf16, 8-bit AdamW", weights="bf16", optimizer="adamw8bit"),
        Strategy("bf16, Adafactor", weights="bf16"),
        Strategy("bf16, Adafactor, fused backward", weights="bf16", fused_backward=True),
    ]
    many = [
        Strategy("DDP, fp32, Adafactor", sharding="ddp"),
        Strategy("DDP, fp32, AdamW", optimizer="adamw", sharding="ddp"),
        Strategy("FSDP2 full, AdamW", optimizer="adamw", sharding="fsdp", whole_gradients=False),
        Strategy("FSDP2 hybrid, AdamW", optimizer="adamw", sharding="fsdp_hybrid", whole_gradients=False),
        Strategy("ZeRO-1, AdamW", optimizer="adamw", sharding="zero1"),
        Strategy("ZeRO-2, AdamW", optimizer="adamw", sharding="zero2"),
        Strategy("ZeRO-3, AdamW", optimizer="adamw", sharding="zero3"),
        Strategy("ZeRO-2, AdamW, optimizer offloaded", optimizer="adamw", sharding="zero2", offload="optimizer"),
        Strategy("ZeRO-3, AdamW, all offloaded", optimizer="adamw", sharding="zero3", offload="all"),
    ]
    return (*one, *(replace(strategy, num_ranks=num_ranks) for strategy in many))


@dataclass(frozen=True)
class Fixed:
    """Bytes on one rank's device that do not depend on the micro-batch, and what lies in host memory for it."""

    weights: int
    master: int
    """fp32 copies that the optimizer updates, where the forward reads others."""
    gradients: int
    optimizer: int
    ema: int
    frozen: int
    """Weights of networks that are not trained: in fp32, a base below adapters as `lora.base_weights` says."""
    buffers: int
    """For communication, and units that are gathered while they are used."""
    update: int
    """Largest temporaries of the update, at another time than activations; with fused backward those of a pass."""
    host: int

    @property
    def total(self) -> int:
        """All but temporaries of the update, in bytes on the device."""
        parts = (self.weights, self.master, self.gradients, self.optimizer, self.ema, self.frozen, self.buffers)
        return sum(parts)


def optimizer_state_bytes(name: str, shapes: Sequence[Shape]) -> int:
    """Return the bytes of an optimizer's state for parameters of these shapes: fp32, whatever the weights are."""
    if name == "adafactor":
        return 4 * sum(_factor_elements(shape) for shape in shapes)
    if (states := _8BIT.get(name)) is not None:
        return states * sum(_8bit_bytes(prod(shape)) for shape in shapes)
    return _STATES_PER_ELEMENT[name] * 4 * sum(map(prod, shapes))


def _factor_elements(shape: Shape) -> int:
    # A matrix is kept as its row and column means; what has one dimension is kept whole.
    return prod(shape[:-1]) + prod((*shape[:-2], shape[-1])) if len(shape) >= 2 else prod(shape)


def _8bit_bytes(elements: int) -> int:
    return elements + 4 * -(-elements // BLOCK_8BIT) if elements >= SMALLEST_8BIT else 4 * elements


def fixed_bytes(
    strategy: Strategy,
    trained: Mapping[str, Shape],
    *,
    beside_elements: int = 0,
    frozen_bytes: int,
    largest_unit_elements: int,
) -> Fixed:
    """Return what stays in memory on one rank. beside_elements: of what lies untrained in trained networks.

    largest_unit_elements: of a block that is gathered whole (FSDP, ZeRO-3). Frozen networks are not split. Sharded
    parts are taken to split evenly.
    """
    shapes = list(trained.values())
    elements = sum(map(prod, shapes))
    is_zero, is_fsdp = strategy.sharding.startswith("zero"), strategy.sharding.startswith("fsdp")
    within_node = strategy.sharding == "fsdp_hybrid"
    ranks = min(strategy.num_ranks, strategy.ranks_per_node) if within_node else strategy.num_ranks
    size = 4 if strategy.weights == "fp32" else 2
    stage = int(strategy.sharding[-1]) if is_zero else 0
    weight_ranks = ranks if is_fsdp or stage == 3 else 1
    gradient_ranks = ranks if stage >= 2 or (is_fsdp and not (strategy.whole_gradients and strategy.accumulates)) else 1
    state_ranks = ranks if is_fsdp or is_zero else 1
    state = optimizer_state_bytes(strategy.optimizer, shapes) + 2 * elements * strategy.kahan
    fixed = Fixed(
        weights=size * (elements + beside_elements) // weight_ranks,
        master=4 * elements // ranks if is_zero else 0,
        gradients=0 if strategy.fused_backward else size * elements // gradient_ranks,
        optimizer=state // state_ranks,
        ema=4 * elements // (ranks if is_fsdp else 1) if strategy.ema == "device" else 0,
        frozen=frozen_bytes,
        buffers=_buffers(strategy, elements, size, largest_unit_elements),
        update=0 if strategy.fused_backward else _update_peak(strategy, [prod(shape) for shape in shapes]),
        host=4 * elements if strategy.ema == "host" else 0,
    )
    if strategy.offload != "none":
        fixed = replace(fixed, host=fixed.host + fixed.master + fixed.optimizer, master=0, optimizer=0)
    if strategy.offload == "all":
        fixed = replace(fixed, host=fixed.host + fixed.weights, weights=0)
    return fixed


def _buffers(strategy: Strategy, elements: int, size: int, largest_unit: int) -> int:
    if strategy.sharding == "ddp":
        return size * elements  # DDP's buckets, unless gradients are views of them (gradient_as_bucket_view)
    if strategy.sharding.startswith("fsdp"):
        return 2 * 2 * largest_unit + 4 * largest_unit  # bf16, the unit in use and the next; a gradient not yet split
    if strategy.sharding.startswith("zero"):
        bucket = 4 * min(ZERO_BUCKET_ELEMENTS, elements)
        return 2 * (bucket + 4 * largest_unit) if strategy.sharding == "zero3" else bucket
    return 0


def update_bytes(strategy: Strategy) -> int:
    """Return the bytes per element that an update takes for the time it lasts, beside gradient, weight and state.

    16-bit weights are widened with their gradients, which are freed (`training.optim.one_by_one`).
    """
    is_cpu = strategy.device == "cpu"
    inner = _UPDATE_NUMBERS.get(strategy.optimizer, 0)
    if strategy.optimizer == "adamw" and is_cpu:
        inner = 2  # the root and its quotient; on a GPU one fused kernel
    return 4 * (inner + 2 * (strategy.weights != "fp32"))


def _update_peak(strategy: Strategy, sizes: Sequence[int]) -> int:
    """Return the most that updates take beside weights, state and all gradients: sizes, elements in order."""
    temporary, gradient = update_bytes(strategy), 0 if strategy.weights == "fp32" else 2
    peak = freed = 0
    for size in sizes:
        freed += gradient * size  # before its update; fp32 gradients stay until all are made
        peak = max(peak, temporary * size - freed)
    return peak
