"""DeepSpeed ZeRO-1, 2 and 3: the optimizer's state, then gradients, then weights, in parts on several processes.

DeepSpeed's engine is driven with explicit boundaries: its accumulation is 1, its clipping off, and a step is taken when
the loop says so. Weights are fp32 and the forward runs under autocast, as with every other engine. Gradients are
*summed* over ranks: its averaging is undone in `backward`, the one place. Failed images and clipping become one factor
that its optimizer divides by (`override_loss_scale`).

It flattens parameters, so that only optimizers that treat every element alike can be used. States come out, and go in,
by parameter name and whole: any engine, at any world size, can go on from them.
"""

import copy
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from training.engines.plain import PlainEngine
from training.optimizer_state import OWNED_BY_THE_LAUNCH, load_optimizer_tensors, optimizer_tensors
from training.optimizers import MissingPackageError
from training.tensor_file import NamedTensors, shapes_of
from training.tensor_parts import InParts


class ZeroEngine(PlainEngine):
    """See `training.engines.base.Engine`. offload, to the CPU: "none", "optimizer", "optimizer_and_weights" (stage 3).

    Raises MissingPackageError without DeepSpeed.
    """

    def __init__(self, accelerator: Accelerator, *, exact: bool, stage: int, offload: str = "none") -> None:
        super().__init__(accelerator, exact=exact)
        self.stage = stage
        self._offload = offload
        self._factor = 1.0
        self._library = _library()
        if not dist.is_initialized():  # one process, perhaps with offload
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Move the module to the device, and hand both to DeepSpeed."""
        self._module, self._optimizer = module.to(self.device), optimizer
        self._by_name = dict(module.named_parameters())
        self._trained = {name: p for name, p in self._by_name.items() if p.requires_grad}
        self._shapes = {name: p.shape for name, p in self._by_name.items()}
        names = {parameter: name for name, parameter in self._trained.items()}
        self._members = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
        self._deepspeed, self._zero, *_ = self._library.initialize(
            model=module, optimizer=optimizer, config=self._settings(), dist_init_required=False
        )
        self._prepared = self._deepspeed
        return self._deepspeed  # type: ignore[no-any-return]

    def release(self) -> None:
        self._by_name, self._trained, self._deepspeed, self._zero = {}, {}, None, None
        super().release()

    def _settings(self) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": self.stage}
        pinned = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        zero |= {"offload_optimizer": pinned} if self._offload != "none" else {}
        zero |= {"offload_param": pinned} if self._offload == "optimizer_and_weights" else {}
        return {
            "train_micro_batch_size_per_gpu": 1,  # is read by nothing, but must be there
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }

    @contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        """Return the context of one forward and backward."""
        self._deepspeed.set_gradient_accumulation_boundary(is_last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this micro-batch."""
        self._deepspeed.backward(loss * self.world_size)  # it divides by the number of ranks

    def scale_gradients(self, factor: float) -> None:
        """Multiply all gradients: from here on, as a factor of the step."""
        self._factor *= factor

    def grad_norm(self) -> float:
        """Return the 2-norm of all gradients, in fp32; not finite if any gradient is not."""
        norms = self._zero._get_norm_groups() if self.stage == 3 else [self._zero.scaled_global_norm()]
        values = [float(norm) for norm in norms]  # of a gradient that is not finite: -1
        if any(value < 0 or not math.isfinite(value) for value in values):
            return math.nan
        return math.sqrt(sum(value**2 for value in values)) * self._factor

    def step(self) -> None:
        """Apply the update and forget the gradients."""
        self._zero.override_loss_scale(1.0 / self._factor)
        self._deepspeed.step()
        self._zero.override_loss_scale(1.0)
        self._factor = 1.0

    def skip(self) -> None:
        """Forget the gradients without an update, as DeepSpeed does after an overflow."""
        zero = self._zero
        self._factor = 1.0
        zero.zero_grad(set_to_none=True)
        if self._offload != "none":
            zero.reset_cpu_buffers()
        if self.stage == 3:
            zero.averaged_gradients = {}
            return
        zero.micro_step_id = -1
        if hasattr(zero, "_release_preflattened_grad_buffers"):
            zero._release_preflattened_grad_buffers()
        for number in zero.averaged_gradients:
            zero.averaged_gradients[number] = zero.all_grad_tensors[number] = None

    # --- weights ---

    def model_state(self) -> dict[str, Tensor | InParts]:
        """Return the module's tensors by name, trained ones in parts."""
        assert self._module is not None
        whole: dict[str, Tensor | InParts] = {**self._module.state_dict()}
        get = self._library.utils.safe_get_full_fp32_param
        for name, parameter in self._module.named_parameters():
            if name in self._trained:
                whole[name] = InParts(self._shapes[name], torch.float32, partial(get, parameter))
            elif self.stage == 3 and name in whole:  # not the base below adapters
                whole[name] = InParts(self._shapes[name], parameter.dtype, partial(self._gathered, parameter))
        return whole

    def _gathered(self, parameter: nn.Parameter) -> Tensor:
        with self._library.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def weights_in_parts(self) -> dict[str, Tensor | InParts] | None:
        """Return the module's weights as they are now where it does not hold whole ones."""
        return self.model_state() if self.stage == 3 else None

    def _put(self, name: str, target: Any, tensor: Tensor) -> None:
        """Copy a whole tensor into a weight and its parts."""
        parameter = self._by_name.get(name)
        if parameter is None:  # a buffer
            target.copy_(tensor)
            return
        if self.stage == 3:
            with self._library.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(tensor)
        else:
            parameter.copy_(tensor)
        if name in self._trained:
            self._set(parameter, tensor, slot=None)

    def _set(self, parameter: Any, value: Tensor, *, slot: str | None) -> None:
        """Put this process's part of a whole tensor where DeepSpeed keeps it; slot: of the optimizer, None: weights."""
        utils, extra = self._library.utils, () if slot is None else (slot,)
        if self.stage < 3:
            put = utils.safe_set_full_fp32_param if slot is None else utils.safe_set_full_optimizer_state
            put(parameter, value, *extra)
            return
        num = parameter.ds_tensor.numel()
        own = value.reshape(-1)[num * self.rank : num * (self.rank + 1)]
        part = torch.zeros(num, dtype=value.dtype)  # the last rank's is filled up
        part[: own.numel()] = own
        put = utils.safe_set_local_fp32_param if slot is None else utils.safe_set_local_optimizer_state
        put(parameter, part, *extra)

    # --- the optimizer's state ---

    def _stand_in(self) -> tuple[Any, dict[nn.Parameter, str]]:
        """Return an optimizer like ours, without state, whose parameters are whole ones without memory; and names."""
        assert self._optimizer is not None
        made = {name: nn.Parameter(torch.empty(self._shapes[name], device="meta")) for name in self._trained}
        stand_in = copy.copy(self._optimizer)
        groups = zip(self._optimizer.param_groups, self._members, strict=True)
        stand_in.param_groups = [{**group, "params": [made[one] for one in members]} for group, members in groups]
        stand_in.state = {}  # type: ignore[assignment]
        return stand_in, {parameter: name for name, parameter in made.items()}

    def optimizer_state(self, names: Mapping[nn.Parameter, str]) -> tuple[dict[str, Tensor | InParts], dict[str, Any]]:
        """Return the optimizer's tensors by slot and parameter, in parts, and its other facts. names: not read."""
        assert self._optimizer is not None
        stand_in, own_names = self._stand_in()
        flat: dict[str, Any] = next((state for state in self._optimizer.state.values() if state), {})
        for parameter in own_names:
            like = {slot: torch.empty_like(parameter) for slot, value in flat.items() if _is_flat(value)}
            others = {slot: copy.copy(value) for slot, value in flat.items() if not _is_flat(value)}
            if flat:
                stand_in.state[parameter] = {**others, **like}
        tensors, facts = optimizer_tensors(stand_in, own_names)
        get, state = self._library.utils.safe_get_full_optimizer_state, dict[str, Tensor | InParts]()
        for key, tensor in tensors.items():
            slot, _, name = key.partition("/")
            in_parts = InParts(tensor.shape, torch.float32, partial(get, self._trained[name], slot))
            state[key] = in_parts if tensor.is_meta else tensor
        return state, facts

    def load_optimizer_state(
        self, tensors: NamedTensors, facts: Mapping[str, Any], names: Mapping[nn.Parameter, str]
    ) -> None:
        """Take over a whole state, from any engine. names: not read. Raises OptimizerStateError."""
        assert self._optimizer is not None
        stand_in, own_names = self._stand_in()
        without_memory = {key: torch.empty(shape, device="meta") for key, shape in shapes_of(tensors).items()}
        load_optimizer_tensors(stand_in, without_memory, facts, own_names, place=lambda tensor, *_: tensor)
        for group, loaded in zip(self._optimizer.param_groups, stand_in.param_groups, strict=True):
            group.update({key: loaded[key] for key in loaded if key not in {*OWNED_BY_THE_LAUNCH, "params"}})
        self._make_state(next(iter(stand_in.state.values()), {}))
        for key, tensor in tensors.items():
            slot, _, name = key.partition("/")
            if tensor.ndim == 0:  # such as the number of steps, the same for all parameters
                for state in self._optimizer.state.values():
                    state[slot] = tensor.clone()
            elif tensor.shape == self._shapes[name]:
                self._set(self._trained[name], tensor, slot=slot)

    def _make_state(self, example: Mapping[str, Any]) -> None:
        """Give every flat part a state like that of `example`: zeros for tensors, and what is one number as it is."""
        assert self._optimizer is not None
        zero, state = self._zero, self._optimizer.state
        flats = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        state.clear()
        for flat in flats if example else ():
            state[flat] = {
                slot: torch.zeros_like(flat) if _is_flat(value) else copy.copy(value) for slot, value in example.items()
            }
        if self.stage < 3:
            zero._hp_optimizer_states_linked = False
            if example:
                zero._lazy_init_hp_params_optimizer_state()


def _is_flat(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _library() -> Any:
    try:
        import deepspeed  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise MissingPackageError(
            f"parallel.strategy: DeepSpeed is not installed ({error}): run `pip install -e '.[gpu]'`, or use fsdp2"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
