"""Optimizers by name, and learning-rate schedules as pure functions of the global step."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn


def make_optimizer(
    name: str,
    parts: Mapping[str, Iterable[nn.Parameter]],
    *,
    learning_rates: Mapping[str, float],
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """Return an optimizer with one parameter group per part; each group remembers its `part` and `peak_rate`.

    name: "adamw" or "adafactor" (constant-rate: relative_step, scale_parameter, warmup_init off, as in the seed).
    Raises ValueError for another name.
    """
    groups: list[dict[str, Any]] = []
    for part, parameters in parts.items():
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        if trained:
            rate = learning_rates[part]
            groups.append({"params": trained, "lr": rate, "peak_rate": rate, "part": part})
    if name == "adamw":
        is_cuda = groups[0]["params"][0].is_cuda
        return torch.optim.AdamW(groups, betas=betas, eps=eps, weight_decay=weight_decay, fused=is_cuda or None)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        adafactor: torch.optim.Optimizer = Adafactor(
            groups,
            lr=groups[0]["lr"],
            weight_decay=weight_decay,
            scale_parameter=False,
            relative_step=False,
            warmup_init=False,
        )
        return adafactor
    raise ValueError(f"optimizer.name: {name!r} is not one of adamw, adafactor")


def rate_factor(name: str, *, global_step: int, warmup_steps: int, total_steps: int | None) -> float:
    """Return the share of the peak learning rate at a global step, counted from 0 over the whole run.

    Warm-up is linear and its first step is not 0: (step + 1) / warmup_steps. "linear" and "cosine" end at 0 at
    total_steps and stay there.
    """
    if name != "constant" and global_step < warmup_steps:
        return (global_step + 1) / warmup_steps
    if name in ("constant", "constant_with_warmup"):
        return 1.0
    if total_steps is None:
        raise ValueError(f"schedule {name!r} needs total_steps")
    progress = min(1.0, (global_step - warmup_steps) / (total_steps - warmup_steps))
    return 1.0 - progress if name == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Set each group's learning rate to its peak times `factor`; return the rates by part."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_rate"] * factor
    return {str(group["part"]): float(group["lr"]) for group in optimizer.param_groups}
