"""One process, or several that each hold the whole model (DDP).

The loss handed to `backward` is this rank's share of (1/N) Σ w L over the whole step. Gradients are *summed* over
ranks: DDP's own averaging is undone in `backward`, the one place where an engine's averaging is declared.

exact=True reduces gradients by hand in a fixed order after the last backward (DDP rebuilds its buckets after the
first step, which changes sums from three processes on); exact=False lets DDP overlap reduction with backward.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from training.optimizer_state import load_optimizer_tensors, optimizer_tensors, placed
from training.precision import total_norm
from training.tensor_file import NamedTensors, shapes_of
from training.tensor_parts import InParts

_REDUCE_ELEMENTS = 32 << 20  # gradients are copied together in groups of at most this many elements (128 MB in fp32)


class PlainEngine:
    """See `training.engines.base.Engine`."""

    def __init__(self, accelerator: Accelerator, *, exact: bool) -> None:
        self.accelerator = accelerator
        self.exact = exact
        self.rank = accelerator.process_index
        self.world_size = accelerator.num_processes
        self.device = accelerator.device
        self._module: nn.Module | None = None
        self._prepared: nn.Module | None = None
        self._optimizer: torch.optim.Optimizer | None = None

    @property
    def _uses_ddp(self) -> bool:
        return self._prepared is not self._module

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Move the module to the device and return what forward must be called on."""
        self._module, self._optimizer = module.to(self.device), optimizer
        if self.world_size > 1 and not self.exact:
            self._prepared = self.accelerator.prepare_model(module)
        else:
            self._prepared = module
        return self._prepared

    def release(self) -> None:
        """Let go of what was prepared, so that its memory is free before another module is loaded."""
        self._module = self._prepared = self._optimizer = None
        self.accelerator.free_memory()

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context that forward and loss run in."""
        context: AbstractContextManager[Any] = self.accelerator.autocast()
        return context

    @contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        """Return the context of one forward and backward; DDP decides in forward whether backward will reduce."""
        with nullcontext() if is_last or not self._uses_ddp else self._prepared.no_sync():  # type: ignore[union-attr,operator]
            yield
        if is_last and self.world_size > 1 and not self._uses_ddp:
            self._reduce()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this micro-batch."""
        (loss * self.world_size if self._uses_ddp else loss).backward()  # DDP divides by the number of ranks

    def _reduce(self) -> None:
        """Sum gradients over ranks in a fixed order."""
        for group in self._gradient_groups():
            flat = torch.cat([gradient.reshape(-1) for gradient in group])
            dist.all_reduce(flat)
            parts = torch.split(flat, [gradient.numel() for gradient in group])
            for gradient, part in zip(group, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def scale_gradients(self, factor: float) -> None:
        """Multiply all gradients, once, before the norm is taken (used when images failed at run time)."""
        torch._foreach_mul_(self._gradients(), factor)

    def grad_norm(self) -> float:
        """Return the 2-norm of all gradients, in fp32; not finite if any gradient is not."""
        return total_norm(self._gradients())

    def clip(self, norm: float, max_norm: float) -> None:
        """Scale gradients down so that their norm, which is `norm` now, is at most max_norm."""
        if norm > max_norm:
            self.scale_gradients(max_norm / (norm + 1e-6))

    def step(self) -> None:
        """Apply the update and forget the gradients."""
        assert self._optimizer is not None
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def skip(self) -> None:
        """Forget the gradients without an update."""
        assert self._optimizer is not None
        self._optimizer.zero_grad(set_to_none=True)

    def gather(self, value: Any) -> list[Any]:
        """Return the picklable values of all ranks, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.accelerator.wait_for_everyone()

    def model_state(self) -> dict[str, Tensor | InParts]:
        """Return the module's tensors by name, as trained: not copies."""
        assert self._module is not None
        return dict(self._module.state_dict())

    def weights_in_parts(self) -> dict[str, Tensor | InParts] | None:
        """Return None: the module holds its weights."""
        return None

    def load_model_state(self, tensors: NamedTensors) -> None:
        """Copy whole tensors into the module, one at a time. Raises ValueError naming missing or unexpected keys."""
        own = self.model_state()
        shapes, found = {name: tuple(tensor.shape) for name, tensor in own.items()}, shapes_of(tensors)
        if wrong := sorted(name for name in {*shapes, *found} if shapes.get(name) != found.get(name)):
            raise ValueError(
                f"the state does not fit the network of this run: {', '.join(wrong[:5])} ({len(wrong):,} in all) are "
                "missing, unexpected or of another shape"
            )
        with torch.no_grad():
            for name, tensor in tensors.items():
                self._put(name, own[name], tensor)
                del tensor  # before the next one is read

    def _put(self, name: str, target: Any, tensor: Tensor) -> None:
        """Copy one whole tensor of the module to where it lies."""
        target.copy_(tensor)

    def optimizer_state(self, names: Mapping[nn.Parameter, str]) -> tuple[dict[str, Tensor | InParts], dict[str, Any]]:
        """Return the optimizer's tensors by slot and parameter, not copies, and its other facts."""
        assert self._optimizer is not None
        tensors, facts = optimizer_tensors(self._optimizer, names)
        return {**tensors}, facts

    def load_optimizer_state(
        self, tensors: NamedTensors, facts: Mapping[str, Any], names: Mapping[nn.Parameter, str]
    ) -> None:
        """Take over a state. Raises OptimizerStateError."""
        assert self._optimizer is not None
        load_optimizer_tensors(self._optimizer, tensors, facts, names, place=self._placed)

    def _placed(self, tensor: Tensor, slot: str, parameter: nn.Parameter, group: Mapping[str, Any]) -> Tensor:
        """Return what the optimizer keeps of a whole tensor of its state."""
        return placed(tensor, slot, parameter, group)

    def _parameters(self) -> Iterator[nn.Parameter]:
        assert self._module is not None
        return (parameter for parameter in self._module.parameters() if parameter.requires_grad)

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._parameters() if parameter.grad is not None]

    def _gradient_groups(self) -> Iterator[list[Tensor]]:
        """Yield gradients in parameter order, grouped for reduction; a parameter without one counts as zeros."""
        group: list[Tensor] = []
        elements = 0
        for parameter in self._parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if group and (elements + parameter.numel() > _REDUCE_ELEMENTS or group[0].dtype != parameter.grad.dtype):
                yield group
                group, elements = [], 0
            group.append(parameter.grad)
            elements += parameter.numel()
        if group:
            yield group
