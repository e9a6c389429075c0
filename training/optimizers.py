"""Optimizers by name, their parameter groups, and the learning rate of a step.

Formulas are the libraries' own, except Lion's (`training.optim.lion`). Which parameters are in which part is decided in
`training.optim.selection`; 16-bit weights and updates inside backward are `training.optim.one_by_one`'s.
"""

import importlib
from collections.abc import Collection, Iterable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn

from training.optim.lion import Lion
from training.optim.one_by_one import OneByOne

_EIGHT_BIT = {"adam8bit": "Adam8bit", "adamw8bit": "AdamW8bit", "lion8bit": "Lion8bit"}
NAMES = ("adamw", "adafactor", "lion", *_EIGHT_BIT, "prodigy", "schedule_free")


class MissingPackageError(ValueError):
    """An optimizer needs a package that is not here, or that cannot do it on this machine."""


def make_optimizer(
    name: str,
    parts: Mapping[str, Iterable[nn.Parameter]],
    *,
    learning_rates: Mapping[str, float],
    betas: tuple[float, float] | None = None,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    undecayed: Collection[nn.Parameter] = frozenset(),
    adafactor_eps: float = 1e-30,
    adafactor_clip_threshold: float = 1.0,
    prodigy_d_coef: float = 1.0,
    prodigy_bias_correction: bool = False,
    prodigy_safeguard_warmup: bool = False,
) -> torch.optim.Optimizer:
    """Return an optimizer with a parameter group per part, two where some of its parameters do not decay.

    Each group remembers its `part` and `peak_rate`. name: one of NAMES. betas: default (0.9, 0.999), for Lion
    (0.9, 0.99). Schedule-free comes in its training mode. Raises ValueError for another name, MissingPackageError.
    """
    groups = _groups(parts, learning_rates, weight_decay=weight_decay, undecayed=undecayed)
    rate, first = groups[0]["lr"], groups[0]["params"][0]
    betas = betas or ((0.9, 0.99) if name in ("lion", "lion8bit") else (0.9, 0.999))
    if name == "adamw":
        return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=first.is_cuda or None)
    if name == "lion":
        return Lion(groups, betas=betas)
    if name in _EIGHT_BIT:
        kind = getattr(_eight_bit_library(first.device), _EIGHT_BIT[name])
        optimizer: torch.optim.Optimizer = kind(groups, betas=betas, **({} if name == "lion8bit" else {"eps": eps}))
    elif name == "adafactor":
        from transformers.optimization import Adafactor

        optimizer = Adafactor(
            groups, lr=rate, eps=(adafactor_eps, 1e-3), clip_threshold=adafactor_clip_threshold,
            scale_parameter=False, relative_step=False, warmup_init=False,
        )  # fmt: skip
    elif name == "prodigy":
        optimizer = _library("prodigyopt", extra="optimizers").Prodigy(
            groups, lr=rate, betas=betas, eps=eps, d_coef=prodigy_d_coef,
            use_bias_correction=prodigy_bias_correction, safeguard_warmup=prodigy_safeguard_warmup,
        )  # fmt: skip
    elif name == "schedule_free":
        free = _library("schedulefree", extra="optimizers").AdamWScheduleFree(groups, lr=rate, betas=betas, eps=eps)
        free.train()
        optimizer = free
    else:
        raise ValueError(f"optimizer.name: {name!r} is not one of {', '.join(NAMES)}")
    return optimizer


def _groups(
    parts: Mapping[str, Iterable[nn.Parameter]],
    learning_rates: Mapping[str, float],
    *,
    weight_decay: float,
    undecayed: Collection[nn.Parameter],
) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = []
    for part, parameters in parts.items():
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        decayed = [parameter for parameter in trained if not weight_decay or parameter not in undecayed]
        exempt = [parameter for parameter in trained if weight_decay and parameter in undecayed]
        for members, decay in ((decayed, weight_decay), (exempt, 0.0)):
            if members:
                rate = learning_rates[part]
                groups.append({"params": members, "lr": rate, "peak_rate": rate, "part": part, "weight_decay": decay})
    if not groups:
        raise ValueError("nothing is trained: every parameter of the recipe is frozen")
    return groups


def _library(package: str, *, extra: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingPackageError(
            f"optimizer.name: {package} is not installed ({error}): run `pip install -e '.[{extra}]'`"
        ) from error


def _eight_bit_library(device: torch.device) -> ModuleType:
    """Return bitsandbytes.optim, after an update of one parameter on the device where that is the CPU."""
    library = _library("bitsandbytes", extra="gpu")
    if device.type == "cpu":
        parameter = nn.Parameter(torch.zeros(4096))
        parameter.grad = torch.ones(4096)
        try:
            library.optim.AdamW8bit([parameter]).step()
        except (NotImplementedError, RuntimeError, AttributeError, TypeError) as error:
            raise MissingPackageError(
                f"optimizer.name: bitsandbytes {library.__version__} has no 8-bit optimizers for the CPU ({error}); "
                "use a GPU, another optimizer, or bitsandbytes 0.50 or newer: run `pip install -U -e '.[gpu]'`"
            ) from error
    module: ModuleType = library.optim
    return module


def set_rates(optimizer: torch.optim.Optimizer, factor: float, *, global_step: int | None = None) -> dict[str, float]:
    """Set each group's learning rate to its peak times `factor`; return the rates by part.

    global_step: of the step that comes, counted from 0 over the run; an optimizer that rounds by chance counts by it.
    """
    if isinstance(optimizer, OneByOne) and global_step is not None:
        optimizer.begin_step(global_step)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_rate"] * factor
    return {str(group["part"]): float(group["lr"]) for group in optimizer.param_groups}
