"""A plain engine whose forward runs in fp16: it scales the loss, and passes over steps whose gradients overflow.

fp32 gradients are unscaled in place. fp16 ones (fp16 weights) stay scaled until the optimizer has widened them: below
6e-8 they would be 0.
"""

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from training.engines.plain import PlainEngine
from training.optim.loss_scale import LossScale
from training.optim.one_by_one import OneByOne
from training.precision import total_norm


class ScaledEngine(PlainEngine):
    """See `training.engines.base.Engine`. accelerator: made with mixed_precision "no". Who owns loss_scale saves it."""

    def __init__(self, accelerator: Accelerator, *, exact: bool, loss_scale: LossScale) -> None:
        super().__init__(accelerator, exact=exact)
        self.loss_scale = loss_scale
        self._is_finite = True

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context that forward and loss run in."""
        return torch.autocast(self.device.type, dtype=torch.float16)

    def backward(self, loss: Tensor) -> None:
        """Add the scaled gradients of this micro-batch."""
        super().backward(loss * self.loss_scale.scale)

    def grad_norm(self) -> float:
        """Return the 2-norm of the true gradients, in fp32; not finite if any scaled one overflowed."""
        norm = total_norm(self._gradients()) / self.loss_scale.scale
        self._is_finite = math.isfinite(norm)
        return norm

    def step(self) -> None:
        """Apply the update with true gradients."""
        if isinstance(self._optimizer, OneByOne):
            self._optimizer.grad_scale = self.loss_scale.scale
        else:
            self.scale_gradients(1.0 / self.loss_scale.scale)
        super().step()
        self.loss_scale.update(is_finite=True)

    def skip(self) -> None:
        """Forget the gradients, and halve the scale when it was they that were not finite."""
        super().skip()
        if not self._is_finite:
            self.loss_scale.update(is_finite=False)
        self._is_finite = True
