"""What an engine must offer to the loop: bringing gradients together, and nothing else. A Protocol, no base class.

A step is: for each micro-batch `with engine.micro_batch(…)` forward and `backward`; then `grad_norm`, perhaps
`scale_gradients` and `clip`; then `step` or `skip`.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from training.tensor_file import NamedTensors
from training.tensor_parts import InParts


class Engine(Protocol):
    """One module and one optimizer on one or several processes."""

    rank: int
    world_size: int
    device: torch.device

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Move the module to the device and return what forward must be called on."""

    def release(self) -> None:
        """Let go of module and optimizer, so that their memory is free before others are loaded."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context that forward and loss run in."""

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Return the context of one forward and backward; behind the step's last one gradients are summed over ranks.

        The loss is this rank's share of (1/N) Σ w L over the whole step: an engine undoes its own averaging here.
        """

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this micro-batch."""

    def scale_gradients(self, factor: float) -> None:
        """Multiply all gradients, once, before the norm is taken (used when images failed at run time)."""

    def grad_norm(self) -> float:
        """Return the 2-norm of all gradients, in fp32; not finite if any gradient is not."""

    def clip(self, norm: float, max_norm: float) -> None:
        """Scale gradients down so that their norm, which is `norm` now, is at most max_norm."""

    def step(self) -> None:
        """Apply the update and forget the gradients."""

    def skip(self) -> None:
        """Forget the gradients without an update."""

    def gather(self, value: Any) -> list[Any]:
        """Return the picklable values of all ranks, in rank order, on every rank."""

    def barrier(self) -> None:
        """Wait for all ranks."""

    def model_state(self) -> dict[str, Tensor | InParts]:
        """Return the module's tensors by name, as trained: not copies, and in parts where they lie so."""

    def weights_in_parts(self) -> dict[str, Tensor | InParts] | None:
        """Return the module's weights as they are now, to export; None where the module itself holds whole ones."""

    def load_model_state(self, tensors: NamedTensors) -> None:
        """Copy whole tensors into the module, one at a time. Raises ValueError naming missing or unexpected keys."""

    def optimizer_state(self, names: Mapping[nn.Parameter, str]) -> tuple[dict[str, Tensor | InParts], dict[str, Any]]:
        """Return what `training.optimizer_state.optimizer_tensors` does; tensors may lie in parts. names: prepared."""

    def load_optimizer_state(
        self, tensors: NamedTensors, facts: Mapping[str, Any], names: Mapping[nn.Parameter, str]
    ) -> None:
        """Take over whole tensors, from any engine, one at a time. Raises OptimizerStateError."""
