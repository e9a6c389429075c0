"""Several processes that each hold a part of the model, the gradients and the optimizer's state (FSDP2).

Blocks are gathered when they are needed, in the format that the forward computes in; what is trained stays fp32, cut
along each parameter's first dimension. Parameters keep names and shapes, so the optimizer is the one that plain runs
have. Gradients are *summed* over ranks: FSDP's own averaging is switched off in `_shard`, the one place.

"hybrid" cuts within a machine and copies between machines. Where gradients meet is a choice: once per step (whole
gradients lie on every process until then), or after each micro-batch (only parts do, and more is sent).
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from training.engines.plain import PlainEngine
from training.optim.averaged import local
from training.optim.one_by_one import unwrapped
from training.tensor_parts import InParts, part_of


class FsdpEngine(PlainEngine):
    """See `training.engines.base.Engine`. Raises ValueError where hybrid sharding does not divide the processes."""

    def __init__(
        self, accelerator: Accelerator, *, exact: bool, is_hybrid: bool = False, meets_once_per_step: bool = True
    ) -> None:
        super().__init__(accelerator, exact=exact)
        self._compute = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
        self._meets_once_per_step = meets_once_per_step
        self._mesh = _mesh(self.device.type, self.world_size, is_hybrid=is_hybrid)

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Move the module to the device, cut it up, and let the optimizer have the parts."""
        self._module, self._optimizer, self._prepared = module.to(self.device), optimizer, module
        before = {parameter: name for name, parameter in module.named_parameters()}
        self._shard(module)
        after = dict(module.named_parameters())
        for group in unwrapped(optimizer).param_groups:
            group["params"] = [after[before[parameter]] for parameter in group["params"]]
        if type(unwrapped(optimizer)).__name__ == "Adafactor":
            _start_adafactor(unwrapped(optimizer))
        return module

    def _shard(self, module: nn.Module) -> None:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        # Inputs are left alone: the network needs its noise level in fp32, and autocast casts where it must.
        policy = MixedPrecisionPolicy(
            param_dtype=self._compute, reduce_dtype=torch.float32 if self._compute else None, cast_forward_inputs=False
        )
        # Direct children, too: previews call the networks one by one, without the module around them.
        for unit in [*_blocks(module), *_units(module.children()), module]:
            fully_shard(unit, mesh=self._mesh, mp_policy=policy)
        for unit in self._units():
            unit.set_force_sum_reduction_for_comms(True)
            unit.set_gradient_divide_factor(1.0)
        # The first forward makes its module the root. That must be this one, also when a preview comes first.
        module._get_fsdp_state()._lazy_init()  # type: ignore[operator]

    def _units(self) -> Iterator[Any]:
        from torch.distributed.fsdp import FSDPModule

        assert self._module is not None
        return (unit for unit in self._module.modules() if isinstance(unit, FSDPModule))

    @contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        """Return the context of one forward and backward."""
        self._prepared.set_requires_gradient_sync(is_last or not self._meets_once_per_step)  # type: ignore[union-attr,operator]
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this micro-batch."""
        loss.backward()  # type: ignore[no-untyped-call]

    def scale_gradients(self, factor: float) -> None:
        """Multiply all gradients, once, before the norm is taken (used when images failed at run time)."""
        torch._foreach_mul_([local(gradient) for gradient in self._gradients()], factor)

    def grad_norm(self) -> float:
        """Return the 2-norm of all gradients, in fp32; not finite if any gradient is not."""
        norms = [torch.linalg.vector_norm(local(one), dtype=torch.float32) for one in self._gradients()]
        square = torch.stack(norms).square().sum() if norms else torch.zeros((), device=self.device)
        dist.all_reduce(square, group=self._mesh.get_group(self._mesh.ndim - 1))  # copies of a part count once
        return float(square.sqrt())

    def weights_in_parts(self) -> dict[str, Tensor | InParts] | None:
        """Return the module's weights as they are now."""
        return self.model_state()

    def _put(self, name: str, target: Any, tensor: Tensor) -> None:
        """Cut this process's part out of a whole tensor of the module."""
        part = part_of(tensor, target) if hasattr(target, "device_mesh") else tensor
        local(target).copy_(local(part))

    def _placed(self, tensor: Tensor, slot: str, parameter: nn.Parameter, group: Mapping[str, Any]) -> Tensor:
        """Cut this process's part out of a whole tensor of the optimizer's state."""
        return part_of(tensor, parameter, slot=slot) if tensor.ndim else super()._placed(tensor, slot, parameter, group)


def _start_adafactor(optimizer: torch.optim.Optimizer) -> None:
    """Make its rows and columns in parts: left to itself it makes whole ones, which cannot be mixed with parts."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            shape = parameter.shape
            slots = {"exp_avg_sq": shape}
            if len(shape) >= 2:
                slots = {"exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": shape[:-2] + shape[-1:]}
            zeros = {slot: part_of(torch.zeros(size), parameter, slot=slot) for slot, size in slots.items()}
            optimizer.state[parameter] = {"step": 0, **zeros, "RMS": 0}


def _mesh(device_type: str, world_size: int, *, is_hybrid: bool) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    if not is_hybrid:
        return init_device_mesh(device_type, (world_size,))
    within = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if world_size % within:
        raise ValueError(
            f'parallel.shard "hybrid": {world_size} processes are not a multiple of the {within} on this machine; '
            'give every machine as many, or use "full"'
        )
    return init_device_mesh(device_type, (world_size // within, within), mesh_dim_names=("copies", "parts"))


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of lists of modules: a network's blocks, a text encoder's layers. Nested ones are not."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            for member in child:
                yield from _units(member if isinstance(member, nn.ModuleList) else [member])
        else:
            yield from _blocks(child)


def _units(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Yield those that can be gathered alone: not lists, and not layers of transformers that are computed twice.

    The latter recompute around their call, where FSDP would not gather again.
    """
    for one in modules:
        is_recomputed = bool(getattr(one, "gradient_checkpointing", False)) and hasattr(
            one, "_gradient_checkpointing_func"
        )
        if any(True for _ in one.parameters()) and not isinstance(one, nn.ModuleList) and not is_recomputed:
            yield one
