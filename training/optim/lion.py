"""Lion: the sign of a momentum is the update. One state tensor per parameter, of the parameter's dtype.

Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023 (arXiv 2302.06675), algorithm 2.
"""

from collections.abc import Callable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Rates are 3 to 10 times smaller than AdamW's, and weight decay as much larger (section 5 of the paper)."""

    def __init__(
        self, params: Any, *, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. closure: not supported."""
        assert closure is None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                momentum = state["exp_avg"]
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                parameter.add_(torch.lerp(parameter.grad, momentum, beta1).sign_(), alpha=-group["lr"])
                momentum.lerp_(parameter.grad, 1.0 - beta2)
