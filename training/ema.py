"""A running average of the trained weights, in fp32: what previews and exports show.

The decay is a pure function of the global step, so that nothing but the average itself is saved. Formulas and numbers
are those of diffusers' `EMAModel`; there `update_every` does not exist.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from training.config.precision import EmaConfig
from training.optim.averaged import kept_aside, local, schedule_free_average
from training.tensor_file import NamedTensors, shapes_of
from training.tensor_parts import InParts, part_of


def ema_decay(
    global_step: int,
    *,
    decay: float,
    min_decay: float = 0.0,
    start_step: int = 0,
    gamma: float | None = None,
    power: float = 2 / 3,
) -> float:
    """Return the share of the old average that is kept after step `global_step`, counted from 1.

    0 up to start_step + 1, then (1 + n) / (10 + n), or with a gamma 1 - (1 + n / gamma)^-power, within the bounds;
    n = global_step - start_step - 1. Source: diffusers, `EMAModel.get_decay`; K. Crowson's notes on EMA warm-up.
    """
    n = global_step - start_step - 1
    if n <= 0:
        return 0.0
    warm = (1 + n) / (10 + n) if gamma is None else 1 - (1 + n / gamma) ** -power
    return max(min(warm, decay), min_decay)


class Ema:
    """Averages of parameters, by name. Made from the parameters that an engine has prepared; starts as their copy.

    device: where averages are kept; None: beside the parameters. with_frozen: average those without gradients. Of a
    sharded parameter each process keeps its shard.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        *,
        decay: float,
        min_decay: float = 0.0,
        start_step: int = 0,
        gamma: float | None = None,
        power: float = 2 / 3,
        update_every: int = 1,
        device: torch.device | str | None = None,
        with_frozen: bool = False,
    ) -> None:
        self._parameters = {name: p for name, p in parameters.items() if p.requires_grad or with_frozen}
        self._schedule = {"decay": decay, "min_decay": min_decay, "gamma": gamma, "power": power}
        self._start_step = start_step
        self._update_every = update_every
        self._averages = {
            name: local(p).to(device=device or p.device, dtype=torch.float32, copy=True)
            for name, p in self._parameters.items()
        }

    def decay_at(self, global_step: int) -> float:
        """Return the decay of the update after step `global_step`, counted from 1; `update_every` steps at once."""
        return ema_decay(global_step, start_step=self._start_step, **self._schedule) ** self._update_every  # type: ignore[arg-type]

    @torch.no_grad()
    def update(self, global_step: int) -> None:
        """Take in the weights after step `global_step`, counted from 1. Called after every step, skipped ones too."""
        if global_step % self._update_every:
            return
        share = 1.0 - self.decay_at(global_step)
        for name, parameter in self._parameters.items():
            average = self._averages[name]
            average.lerp_(local(parameter).to(average), share)

    def tensors(self) -> dict[str, Tensor | InParts]:
        """Return averages by parameter name, fp32, not copies; in parts where parameters are."""
        return {name: _saved(self._averages[name], parameter) for name, parameter in self._parameters.items()}

    def load(self, tensors: NamedTensors) -> None:
        """Take over what `tensors` gave. Raises ValueError, and changes nothing, when it is for other parameters."""
        shapes = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}
        saved = shapes_of(tensors)
        if saved != shapes:
            wrong = sorted(name for name in {*shapes, *saved} if shapes.get(name) != saved.get(name))
            raise ValueError(
                f"the state's average does not fit the trained parameters: {', '.join(wrong[:5])} "
                f"({len(wrong):,}); freeze lists and parts must be those of its run"
            )
        for name, tensor in tensors.items():
            parameter = self._parameters[name]
            part = part_of(tensor, parameter) if hasattr(parameter, "device_mesh") else tensor
            self._averages[name].copy_(local(part))

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Put the average into the parameters; the trained weights are back at the end, bit for bit.

        Costs a copy of the weights in CPU memory while it lasts.
        """
        with torch.no_grad(), kept_aside(self._parameters.values()):
            for name, parameter in self._parameters.items():
                local(parameter).copy_(self._averages[name])
            yield


def make_ema(settings: EmaConfig, parameters: Mapping[str, Parameter], *, with_frozen: bool = False) -> Ema | None:
    """Return the average that a config asks for, of prepared parameters by name; None when it asks for none."""
    if not settings.enabled:
        return None
    return Ema(
        parameters,
        decay=settings.decay,
        min_decay=settings.min_decay,
        start_step=settings.start_step,
        gamma=settings.warmup_gamma if settings.warmup == "power" else None,
        power=settings.warmup_power,
        update_every=settings.update_every,
        device="cpu" if settings.device == "cpu" else None,
        with_frozen=with_frozen,
    )


@contextmanager
def weights_to_show(optimizer: torch.optim.Optimizer, ema: Ema | None) -> Iterator[None]:
    """Put in what previews, validation and exports show: the running average, schedule-free's, or what is trained."""
    with ema.swapped_in() if ema is not None else schedule_free_average(optimizer):
        yield


def _saved(average: Tensor, parameter: Any) -> Tensor | InParts:
    if not hasattr(parameter, "device_mesh"):
        return average
    return InParts(parameter.shape, average.dtype, partial(_whole, average, parameter))


def _whole(average: Tensor, parameter: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    shard = average.to(local(parameter).device)
    sharded = DTensor.from_local(
        shard, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )
    whole: Tensor = sharded.full_tensor()
    return whole
