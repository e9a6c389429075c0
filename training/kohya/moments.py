"""Turn the optimizer state of kohya's stage C trainer into ours: other names, and q, k, v stacked in one matrix.

kohya's optimizer numbers its parameters in the order of its networks' parameters; that order is ours, except that
each `in_proj` is six there: weight and bias of to_q, to_k, to_v. Joining them is exact. First and second moments are
stacked. Adafactor's rows are means over columns, so they are stacked; its columns are means over rows, so the stacked
matrix's are the mean of the three: moments are averages with the same decay, and means of averages commute.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_STACKED = {"exp_avg", "exp_avg_sq", "exp_avg_sq_row"}
_AVERAGED = {"exp_avg_sq_col"}
_SECOND = ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col")
_SLOTS = {
    "adafactor": ({"exp_avg_sq_row", "exp_avg_sq_col"}, {"exp_avg_sq"}),
    "adamw": ({"exp_avg", "exp_avg_sq"},),
    "lion": ({"exp_avg"},),
}
_NUMBERS = {"step", "RMS"}


class MomentsError(ValueError):
    """An optimizer state cannot be taken over; the message says why."""


@dataclass
class Moments:
    """Slots by our names of parameters, and what was left behind. Values: tensors, and numbers (`step`, `RMS`)."""

    slots: dict[str, dict[str, Any]] = field(default_factory=dict)
    wiped: list[str] = field(default_factory=list)
    """Parameters whose second moments were all 0 or not finite: they begin anew."""
    num_joined: int = 0
    """Matrices and biases that were made of three."""

    @property
    def step(self) -> int:
        """The most updates that any parameter had."""
        return max((int(one["step"]) for one in self.slots.values() if "step" in one), default=0)


def kohya_order(names: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Yield our name and the share (0 whole; 1, 2, 3: q, k, v) of each parameter in the order of kohya's optimizer.

    names: of a network's parameters, in its own order.
    """
    for name in names:
        if name.endswith(".in_proj_weight"):
            bias = f"{name.removesuffix('weight')}bias"
            for share in (1, 2, 3):
                yield name, share
                yield bias, share
        elif not name.endswith(".in_proj_bias"):
            yield name, 0


def kohya_moments(state: Mapping[str, Any], parts: Sequence[Mapping[str, Tensor]], *, optimizer: str) -> Moments:
    """Return moments by our names. parts: parameters of network and text model, by name in order, one part per group.

    optimizer: the run's. Raises MomentsError for another optimizer, groups or shapes than expected.
    """
    order = [[*kohya_order(list(part))] for part in parts]
    groups = [group["params"] for group in state["param_groups"]]
    if [len(group) for group in groups[: len(order)]] != [len(part) for part in order]:
        raise MomentsError(
            f"its groups have {' and '.join(str(len(group)) for group in groups)} parameters, "
            f"{' and '.join(str(len(part)) for part in order)} are expected: another network, or other parts trained"
        )
    shapes = {name: tuple(tensor.shape) for part in parts for name, tensor in part.items()}
    found = Moments()
    shares: dict[str, list[dict[str, Any]]] = {}
    for group, part in zip(groups, order, strict=False):  # kohya may have trained more
        for number, (name, share) in zip(group, part, strict=True):
            slots = {slot: _widened(value) for slot, value in state["state"].get(number, {}).items()}
            if slots:
                _require_kind(slots, optimizer)
                _require_shape(name, slots, shapes[name], is_share=share > 0)
            shares.setdefault(name, []).append(slots)
    for name, slots_of_shares in shares.items():
        if not all(slots_of_shares):
            continue  # kohya never had a gradient for it
        joined = slots_of_shares[0] if len(slots_of_shares) == 1 else _joined(slots_of_shares)
        found.num_joined += len(slots_of_shares) > 1
        if _is_wiped(joined):
            found.wiped.append(name)
        else:
            found.slots[name] = joined
    return found


def _widened(value: Any) -> Any:
    """Return 16-bit moments in fp32, as ours are; all else as it is."""
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _require_kind(slots: Mapping[str, Any], optimizer: str) -> None:
    own = {slot for slot in slots if slot not in _NUMBERS}
    if optimizer not in _SLOTS:
        raise MomentsError(f"states of {optimizer!r} are not taken over; {', '.join(_SLOTS)} are")
    if own not in _SLOTS[optimizer]:
        fitting = [name for name, kinds in _SLOTS.items() if own in kinds]
        kind = f"it is {fitting[0]}'s" if fitting else f"it holds {', '.join(sorted(own))}"
        raise MomentsError(f"the run's optimizer is {optimizer!r}, but {kind}")


def _require_shape(name: str, slots: Mapping[str, Any], shape: tuple[int, ...], *, is_share: bool) -> None:
    whole = (shape[0] // 3, *shape[1:]) if is_share else shape
    expected = {"exp_avg_sq_row": whole[:-1], "exp_avg_sq_col": (*whole[:-2], *whole[-1:])}
    for slot, value in slots.items():
        if slot not in _NUMBERS and tuple(value.shape) != expected.get(slot, whole):
            raise MomentsError(
                f"{name}: {slot} has shape {list(value.shape)}, {list(expected.get(slot, whole))} is expected"
            )


def _joined(shares: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the slots of the matrix that q, k and v are stacked in."""
    joined: dict[str, Any] = {}
    for slot, value in shares[0].items():
        values = [share[slot] for share in shares]
        if slot in _STACKED:
            joined[slot] = torch.cat(values)
        elif slot in _AVERAGED:
            joined[slot] = torch.stack(values).mean(dim=0)
        elif slot == "RMS":  # of the parameter; a tensor or a number, by the version
            squares = [float(one) ** 2 for one in values]
            root = (sum(squares) / len(squares)) ** 0.5
            joined[slot] = torch.tensor(root, dtype=value.dtype) if isinstance(value, Tensor) else root
        elif len({float(one) for one in values}) == 1:
            joined[slot] = value
        else:
            raise MomentsError(f"to_q, to_k and to_v of one block have different {slot}")
    return joined


def _is_wiped(slots: Mapping[str, Any]) -> bool:
    second = [slots[slot] for slot in _SECOND if slot in slots]
    tensors = [value for slot, value in slots.items() if slot not in _NUMBERS]
    return any(not one.isfinite().all() for one in tensors) or any(not one.any() for one in second)
