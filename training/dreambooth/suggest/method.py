"""Which way of training fits a card: the wiki's choice by its memory, checked by the memory planner."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from training.config import RunConfig
from training.dreambooth.single_file.layout import Family
from training.memory.architecture import architecture_of
from training.memory.planner import Planner, largest_bucket, room_bytes, strategy_of

Method = Literal["full", "staged", "lora"]
FULL_FROM, STAGED_FROM, SDXL_FULL_FROM = 12, 10, 24
"""GB of a card, by the wiki: 12 and more train whole, 10 in stages, less with LoRA. It is older than SDXL."""
BATCH_SIZE = 4
"""The wiki's batch size of 2 with 2 accumulated."""
MICRO_BATCH_SIZES = (4, 2, 1)
_LORA_RANK, _LORA_ALPHA = 16, 8.0


@dataclass(frozen=True)
class Way:
    """A way of training that fits. peak_bytes: planned, of a step or while loading."""

    method: Method
    family: Family
    side: int
    """Pixels of a square."""
    micro_batch_size: int
    batch_size: int
    checkpointing: bool
    peak_bytes: int
    passed_over: tuple[str, ...]
    """What did not fit, each with its number."""


def choose_way(family: Family, model: str, *, side: int, vram_gb: float) -> Way:
    """Return the first way that fits: by the wiki's choice for the card, less demanding ones after it.

    Micro-batches as large as fit, up to 4; without recomputation where that fits too. Raises ValueError when nothing
    fits.
    """
    room = room_bytes(int(vram_gb * 2**30))
    passed_over: list[str] = []
    for method in _by_card(family, vram_gb):
        smallest = 0
        for checkpointing in (False, True):
            config = RunConfig.model_validate(tables_of(method, family, model, side=side, checkpointing=checkpointing))
            planner = Planner(architecture_of(config), largest_bucket(config), max_tokens=config.recipe.max_tokens)
            estimate = planner.estimate(strategy_of(config, num_processes=1))
            fitting = [size for size in MICRO_BATCH_SIZES if estimate.peak(size) <= room]
            # Two at once without recomputation are faster than four with it.
            if fitting and (fitting[0] > 1 or checkpointing):
                size = fitting[0]
                batch = size if method == "staged" or (method, family) == ("full", "sdxl") else BATCH_SIZE
                return Way(
                    method, family, side, size, batch, checkpointing, estimate.peak(size), tuple(passed_over),
                )  # fmt: skip
            smallest = estimate.peak(1)
        passed_over.append(f"{method} takes {smallest / 1e9:.1f} GB with one image, {room / 1e9:.1f} GB are there")
    raise ValueError(f"--vram {vram_gb:g}: nothing fits: {'; '.join(passed_over)}")


def _by_card(family: Family, vram_gb: float) -> Iterator[Method]:
    if vram_gb >= (SDXL_FULL_FROM if family == "sdxl" else FULL_FROM):
        yield "full"
    if vram_gb >= STAGED_FROM and family != "sdxl":
        yield "staged"
    yield "lora"


def tables_of(method: Method, family: Family, model: str, *, side: int, checkpointing: bool) -> dict[str, Any]:
    """Return what of a run.toml decides its memory."""
    in_bf16 = method != "lora" and (method == "staged" or family == "sdxl")
    tables: dict[str, Any] = {
        "name": "suggestion",
        "data": {"workspace": "workspace"},
        "batch": {"batch_size": 1, "micro_batch_size": 1} if in_bf16 else {"batch_size": 4, "micro_batch_size": 1},
        "buckets": buckets_of(family, side),
        "optimizer": {"name": "adamw8bit", **({"fused_backward": True, "max_grad_norm": 0.0} if in_bf16 else {})},
        "precision": precision_of(method, family),
        "dreambooth": {
            "model": model,
            "train": list(trained_of(method, family)),
            "gradient_checkpointing": checkpointing,
        },
    }
    if method == "lora":
        own = {"rank": _LORA_RANK, "alpha": _LORA_ALPHA}
        tables["lora"] = {
            "targets": ["kohya"],
            **own,
            "base_weights": "fp16",
            **({} if family == "sdxl" else {"text_encoder": own}),
        }
    return tables


def trained_of(method: Method, family: Family) -> tuple[str, ...]:
    """Return the parts that are trained, in the first stage where there are two. SDXL's text encoders rest."""
    return ("unet",) if method == "full" or family == "sdxl" else ("unet", "text_encoder")


def precision_of(method: Method, family: Family) -> Mapping[str, str]:
    """Return the table [precision]."""
    if method == "full" and family == "sdxl":
        return {"autocast": "bf16", "weights": "bf16", "rounding": "stochastic"}
    return {"autocast": "bf16" if method == "staged" else "fp16"}


def buckets_of(family: Family, side: int) -> Mapping[str, Any]:
    """Return the table [buckets]: the wiki's for 512 pixels, sizes of equal area above."""
    if side <= 512:
        return {"family": "long_side", "resolution": [side, side], "step": 64}
    return {"family": "area", "resolution": [side, side], "step": 64, "min_side": side // 2, "max_side": 2 * side}
