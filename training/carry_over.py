"""What the optimizer keeps where another stage of a run begins, and other parts are trained than in the one before.

Moments of a parameter that both stages train go on; of one that is new they start at zero, as at the start of a run;
those of a part that is no longer trained are forgotten. Options that an optimizer keeps per group (Prodigy's `d`) go on
for a group with a parameter that was trained before.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from training.config import RunConfig
from training.optimizer_state import OptimizerStateError
from training.stages import stages_of
from training.tensor_file import NamedTensors, shapes_of

CarryOver = Literal["all", "keep", "fresh"]
"""all: the state is of the same stage; keep: of another one, moments go on; fresh: of another one, none do."""


@dataclass(frozen=True)
class OptimizerState:
    """An optimizer's state as `training.optimizer_state.optimizer_tensors` gives it."""

    tensors: NamedTensors
    facts: Mapping[str, Any]


def carry_over_to(config: RunConfig, chunk: str, *, state_of: str) -> CarryOver:
    """Return what `chunk` takes from the optimizer's state of the chunk `state_of`."""
    values = {stage.chunk: stage.values for stage in stages_of(config)}
    if chunk == state_of or chunk not in values or state_of not in values:
        return "all"
    return values[chunk].optimizer


def carried_over(state: OptimizerState, own: Mapping[str, Any], *, is_fresh: bool) -> OptimizerState:
    """Return the state for an optimizer that has just been made. own: its facts.

    Raises OptimizerStateError when the state is another optimizer's and moments are to go on.
    """
    saved = state.facts
    if not is_fresh and saved["optimizer"] != own["optimizer"]:
        raise OptimizerStateError(
            f'the state is from {saved["optimizer"]}, this is {own["optimizer"]}: set the stage\'s optimizer = "fresh"'
        )
    kept = set() if is_fresh else {*saved["slots"]} & {*own["slots"]}
    slots = {name: saved["slots"][name] if name in kept else entry for name, entry in own["slots"].items()}
    options_of = {name: group["options"] for group in saved["groups"] for name in group["parameters"] if name in kept}
    groups = [
        {**group, "options": next((options_of[n] for n in group["parameters"] if n in kept), group["options"])}
        for group in own["groups"]
    ]
    facts = {**own, "groups": groups, "slots": slots}
    return OptimizerState(_Chosen(state.tensors, {f"{slot}/{n}" for n in kept for slot in slots[n]["tensors"]}), facts)


class _Chosen:
    """Some of the tensors, still gone through one at a time."""

    def __init__(self, tensors: NamedTensors, names: set[str]) -> None:
        self._tensors, self._names = tensors, names

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, shape in shapes_of(self._tensors).items() if name in self._names}

    def items(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor) for name, tensor in self._tensors.items() if name in self._names)
