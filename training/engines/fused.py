"""Update each parameter inside the backward pass, and free its gradient at once: gradients are never all alive.

One process, one micro-batch per step, no clipping (`training.config.optimizer.fused_backward_problems`). Updates cannot
be taken back, so the guard comes first: a loss that is not finite, or 0 (no image could be read), has no backward. When
images failed at run time, the gradient stays divided by the number planned.
"""

import logging
import math

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from training.engines.plain import PlainEngine
from training.errors import NonFiniteError
from training.optim.one_by_one import OneByOne

logger = logging.getLogger(__name__)


class FusedEngine(PlainEngine):
    """See `training.engines.base.Engine`. Raises ValueError for several processes."""

    def __init__(self, accelerator: Accelerator, *, exact: bool) -> None:
        super().__init__(accelerator, exact=exact)
        if self.world_size != 1:
            raise ValueError(
                f"optimizer.fused_backward: {self.world_size} processes would each make their own update: launch one"
            )
        self._norms: list[Tensor] = []
        self._loss_is_finite = True
        self._told = False

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Move the module to the device, and let its parameters update themselves. optimizer: a OneByOne."""
        if not isinstance(optimizer, OneByOne):
            raise ValueError(f"fused backward needs an optimizer that steps one by one, got {type(optimizer).__name__}")
        prepared = super().prepare(module, optimizer)
        for parameter in self._parameters():
            parameter.register_post_accumulate_grad_hook(self._update)  # type: ignore[no-untyped-call]
        return prepared

    @property
    def _one_by_one(self) -> OneByOne:
        assert isinstance(self._optimizer, OneByOne)
        return self._optimizer

    def _update(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
        self._norms.append(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32))
        self._one_by_one.step_parameter(parameter)

    def backward(self, loss: Tensor) -> None:
        """Update parameters, unless the loss is not finite or 0."""
        assert not self._norms, "one micro-batch per step"
        value = float(loss.detach())
        self._loss_is_finite = math.isfinite(value)
        if self._loss_is_finite and value != 0.0:
            super().backward(loss)

    def scale_gradients(self, factor: float) -> None:
        """Do nothing: the update is made. Says so once."""
        if not self._told:
            logger.warning("fused backward: gradients keep N planned where images failed, factor %.4f left out", factor)
            self._told = True

    def grad_norm(self) -> float:
        """Return the 2-norm of the gradients that were applied; not a number when none was because of the loss."""
        if not self._loss_is_finite:
            return math.nan
        return float(torch.linalg.vector_norm(torch.stack(self._norms))) if self._norms else 0.0

    def clip(self, norm: float, max_norm: float) -> None:
        """Raise ValueError: gradients are gone."""
        raise ValueError(f"optimizer.max_grad_norm {max_norm:g}: fused backward cannot clip; set it to 0")

    def step(self) -> None:
        """Get ready for the next step: the update is made."""
        self._norms.clear()

    def skip(self) -> None:
        """Get ready for the next step. Raises NonFiniteError when updates were made that should not have been."""
        was_applied, self._loss_is_finite = bool(self._norms), True
        self._norms.clear()
        if was_applied:
            step = (self._one_by_one.global_step or 0) + 1
            raise NonFiniteError(
                f"step {step}: a gradient is not finite although the loss is, and fused backward has already updated "
                "weights with it; the last saved state is intact. Lower the learning rate, or switch "
                "optimizer.fused_backward off",
                range(step, step + 1),
            )
