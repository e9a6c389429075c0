"""Take an optimizer's state out by parameter name, and put it back bit for bit.

`torch.optim.Optimizer.load_state_dict` casts every floating slot to its parameter's dtype: second moments of 1e-12
become 0 in float16. Here nothing is cast, and nothing depends on the order of parameters. A slot is whatever the
optimizer keeps for a parameter: `exp_avg`, Adafactor's rows and columns, bitsandbytes' uint8 `state1` and `qmap1`.
What is loaded is taken one tensor at a time, and an engine whose parameters lie in parts says how each is cut; parts
that are saved are brought together for the snapshot.
"""

import math
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from training.optim.one_by_one import unwrapped
from training.tensor_file import NamedTensors, shapes_of

OWNED_BY_THE_LAUNCH = frozenset({"lr", "peak_rate", "part", "foreach", "fused", "capturable", "differentiable"})
"""Group options that a launch sets itself: rates come from config and step, the others from the machine."""

_SCALARS = (bool, int, float, str, type(None))


Place = Callable[[Tensor, str, Parameter, Mapping[str, Any]], Tensor]
"""Gives what an optimizer keeps of a loaded tensor, from its slot, its parameter and the parameter's group."""


class OptimizerStateError(ValueError):
    """A saved optimizer state does not fit the optimizer."""


def placed(tensor: Tensor, slot: str, parameter: Parameter, group: Mapping[str, Any]) -> Tensor:
    """Return a copy where torch has it: beside the parameter, but `step` on the CPU, unless fused or capturable."""
    stays = slot == "step" and not (group.get("capturable") or group.get("fused"))
    device = torch.device("cpu") if stays else parameter.device
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device).copy_(tensor)


def optimizer_tensors(optimizer: Optimizer, names: Mapping[Parameter, str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state's tensors as {"<slot>/<parameter name>": tensor} and everything else as JSON-able facts.

    The tensors are the optimizer's own, not copies (`take_snapshot` copies). names: of every parameter in its groups.
    Raises OptimizerStateError for a parameter without a name or a slot of an unknown kind.
    """
    optimizer = unwrapped(optimizer)
    tensors: dict[str, Tensor] = {}
    slots: dict[str, dict[str, Any]] = {}
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        members = []
        for parameter in group["params"]:
            name = _name_of(parameter, names, number)
            members.append(name)
            values: dict[str, Any] = {}
            tensor_slots: list[str] = []
            for slot, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{slot}/{name}"] = value.detach()
                    tensor_slots.append(slot)
                elif isinstance(value, _SCALARS):
                    values[slot] = value
                else:
                    raise OptimizerStateError(f"optimizer slot {slot} of {name}: cannot save a {type(value).__name__}")
            slots[name] = {"shape": list(parameter.shape), "tensors": tensor_slots, "values": values}
        groups.append({"parameters": members, "options": _options(group, number)})
    return tensors, {"optimizer": type(optimizer).__name__, "groups": groups, "slots": slots}


def load_optimizer_tensors(
    optimizer: Optimizer,
    tensors: NamedTensors,
    facts: Mapping[str, Any],
    names: Mapping[Parameter, str],
    *,
    keep: Container[str] = OWNED_BY_THE_LAUNCH,
    place: Place = placed,
) -> None:
    """Replace the optimizer's state by a saved one: same dtypes, same bits. Tensors are gone through once.

    keep: group options that stay as this launch made them; all others are restored, as some optimizers keep state
    there (Prodigy's `d`). Nothing is changed when OptimizerStateError is raised: another optimizer, other parameters,
    shapes or groups, a missing slot or one too many. Where reading fails half-way, the old state is gone.
    """
    optimizer = unwrapped(optimizer)
    if facts["optimizer"] != type(optimizer).__name__:
        raise OptimizerStateError(f"the state is from {facts['optimizer']}, this is {type(optimizer).__name__}")
    members = [[_name_of(p, names, n) for p in group["params"]] for n, group in enumerate(optimizer.param_groups)]
    saved_members = [group["parameters"] for group in facts["groups"]]
    if [sorted(group) for group in members] != [sorted(group) for group in saved_members]:
        now, was = ({name for group in groups for name in group} for groups in (members, saved_members))
        difference = f"new: {_some(now - was)}; gone: {_some(was - now)}" if now != was else "in other groups"
        raise OptimizerStateError(f"the state is for other parameters ({difference})")
    slots = facts["slots"]
    expected = {f"{slot}/{name}" for name, entry in slots.items() for slot in entry["tensors"]}
    if expected != (found := set(shapes_of(tensors))):
        raise OptimizerStateError(
            f"optimizer slots missing: {_some(expected - found)}; too many: {_some(found - expected)}"
        )
    for parameter, name, _ in _parameters(optimizer, names):
        entry = slots[name]
        if entry["shape"] != list(parameter.shape):
            raise OptimizerStateError(f"{name}: shape {list(parameter.shape)}, the state is for {entry['shape']}")
        own = set(optimizer.state.get(parameter, {}))
        saved = {*entry["tensors"], *entry["values"]}
        if own and saved and own != saved:
            raise OptimizerStateError(f"{name}: slots {_some(own)}, the state has {_some(saved)}")

    restored: dict[str, dict[str, Any]] = {}
    owners = {name: (parameter, group) for parameter, name, group in _parameters(optimizer, names)}
    for name, (parameter, _) in owners.items():
        optimizer.state.pop(parameter, None)
        # In the saved order; values of tensors follow below.
        restored[name] = {**dict.fromkeys(slots[name]["tensors"]), **slots[name]["values"]}
        if restored[name]:
            optimizer.state[parameter] = restored[name]
    for key, tensor in tensors.items():
        slot, _, name = key.partition("/")
        restored[name][slot] = place(tensor, slot, *owners[name])
        del tensor  # before the next one is read
    for group, saved_group in zip(optimizer.param_groups, facts["groups"], strict=True):
        for option, value in saved_group["options"].items():
            if option not in keep:
                group[option] = _restored(value)


def _parameters(
    optimizer: Optimizer, names: Mapping[Parameter, str]
) -> Iterator[tuple[Parameter, str, dict[str, Any]]]:
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            yield parameter, _name_of(parameter, names, number), group


def _name_of(parameter: Parameter, names: Mapping[Parameter, str], group: int) -> str:
    try:
        return names[parameter]
    except KeyError:
        shape = list(parameter.shape)
        raise OptimizerStateError(f"a parameter of shape {shape} in optimizer group {group} has no name") from None


def _options(group: Mapping[str, Any], number: int) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for option, value in group.items():
        if option == "params" or option in OWNED_BY_THE_LAUNCH:
            continue
        items = value if isinstance(value, tuple | list) else [value]
        if not all(isinstance(item, _SCALARS) for item in items):
            raise OptimizerStateError(f"option {option!r} of optimizer group {number}: cannot save {value!r}")
        saved = [_saved(item) for item in items]
        options[option] = saved if isinstance(value, tuple | list) else saved[0]
    return options


def _saved(value: Any) -> Any:
    """Return the value as strict JSON has a word for it: Prodigy's growth rate is infinite."""
    return {"float": repr(value)} if isinstance(value, float) and not math.isfinite(value) else value


def _restored(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_restored(item) for item in value)
    return float(value["float"]) if isinstance(value, dict) else value


def _some(names: Container[str] | set[str]) -> str:
    assert isinstance(names, set)
    listing = ", ".join(sorted(names)[:5])
    return (listing or "none") + (f" … ({len(names)})" if len(names) > 5 else "")
