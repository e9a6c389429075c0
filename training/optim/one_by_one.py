"""Take an optimizer's step parameter by parameter: for weights of 16 bits, and for updates inside backward.

An optimizer made for fp32 sees one parameter at a time: its value widened to fp32, its gradient unscaled in fp32. Its
state is fp32 and stays under the real parameter. Then the new value is rounded into the parameter. Memory for fp32
copies is that of the largest parameter, a few times. fp32 parameters are updated in place.

Not for optimizers that keep one number for all parameters (Prodigy, schedule-free): `training.config` refuses these.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from training.optim.rounding import compensated_bf16, rounding_key, stochastic_bf16

Rounding = Literal["nearest", "stochastic", "kahan"]
LOST = "kahan_lost"
"""Slot of an optimizer's state: what rounding a parameter to bf16 has lost so far."""


class OneByOne(torch.optim.Optimizer):
    """Wraps `inner`; groups and state are the inner one's own.

    names: of every parameter. `begin_step` must be called before each step: the rounding bits are counted by it.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        names: Mapping[Parameter, str],
        *,
        seed: int = 0,
        rounding: Rounding = "nearest",
    ) -> None:
        self.inner = inner
        self.grad_scale = 1.0
        """What the loss, and so the gradients of 16-bit parameters, were multiplied by."""
        self._names = names
        self._seed = seed
        self._rounding = rounding
        self.global_step: int | None = None
        """Of the step that comes or is being taken, counted from 0."""
        self._group_of = {parameter: group for group in inner.param_groups for parameter in group["params"]}
        super().__init__(inner.param_groups, inner.defaults)
        self.param_groups = inner.param_groups
        self.state = inner.state

    def begin_step(self, global_step: int) -> None:
        """Say which step comes next."""
        self.global_step = global_step

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, and free the gradient. closure: not supported."""
        assert closure is None
        for parameter in self._group_of:
            if parameter.grad is not None:
                self.step_parameter(parameter)

    @torch.no_grad()
    def step_parameter(self, parameter: Parameter) -> None:
        """Update one parameter with its gradient, and free the gradient.

        Raises RuntimeError when `begin_step` was never called and rounding is by chance.
        """
        if parameter.dtype == torch.float32:
            if self.grad_scale != 1.0 and parameter.grad is not None:
                parameter.grad.div_(self.grad_scale)
            with self._only(parameter, parameter):
                self.inner.step()
        else:
            self._step_widened(parameter)
        parameter.grad = None

    def _step_widened(self, parameter: Parameter) -> None:
        assert parameter.grad is not None
        wide = Parameter(parameter.detach().float())
        if LOST in self.state[parameter]:
            wide.add_(self.state[parameter].pop(LOST).float())
        gradient = parameter.grad.float()
        parameter.grad = None
        wide.grad = gradient.div_(self.grad_scale) if self.grad_scale != 1.0 else gradient
        self.state[wide] = self.state.pop(parameter)
        with self._only(parameter, wide):
            self.inner.step()
        self.state[parameter] = self.state.pop(wide)
        parameter.copy_(self._rounded(parameter, wide.detach()))

    def _rounded(self, parameter: Parameter, wide: Tensor) -> Tensor:
        if self._rounding == "kahan":
            rounded, self.state[parameter][LOST] = compensated_bf16(wide)
            return rounded
        if self._rounding == "stochastic":
            if self.global_step is None:
                raise RuntimeError("begin_step was not called: rounding bits are counted by the global step")
            return stochastic_bf16(wide, rounding_key(self._seed, self.global_step, self._names[parameter]))
        return wide.to(parameter.dtype)

    @contextmanager
    def _only(self, parameter: Parameter, seen: Parameter) -> Iterator[None]:
        """Let the inner optimizer see one parameter alone, in its group; what it writes to the group is kept."""
        groups, group = self.inner.param_groups, self._group_of[parameter]
        members = group["params"]
        group["params"] = [seen]
        self.inner.param_groups = [group]
        try:
            yield
        finally:
            self.inner.param_groups = groups
            group["params"] = members


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer that computes updates."""
    return optimizer.inner if isinstance(optimizer, OneByOne) else optimizer
