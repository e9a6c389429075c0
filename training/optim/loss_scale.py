"""Scale the loss of an fp16 forward, so that small gradients do not become 0: the rule of torch's GradScaler.

Doubled after 2,000 good steps in a row, halved when gradients overflow; such a step is passed over. Pure numbers: who
multiplies what is the engine's. The scale is part of the state: a run that began again at 65,536 would lose steps.
"""

from collections.abc import Mapping
from typing import Any

GROWTH_STEPS = 2000
INITIAL_SCALE = 65536.0


class LossScale:
    """The same on every rank, as every rank sees the same gradient norm."""

    def __init__(self, scale: float = INITIAL_SCALE) -> None:
        self.scale = scale
        self._good_steps = 0

    def update(self, *, is_finite: bool) -> None:
        """Take note of a step's gradients."""
        if not is_finite:
            self.scale = max(self.scale / 2, 1.0)
            self._good_steps = 0
            return
        self._good_steps += 1
        if self._good_steps == GROWTH_STEPS:
            self.scale *= 2
            self._good_steps = 0

    def facts(self) -> dict[str, float | int]:
        """Return what a state keeps."""
        return {"scale": self.scale, "good_steps": self._good_steps}

    def load(self, facts: Mapping[str, Any]) -> None:
        """Take over what `facts` gave."""
        self.scale, self._good_steps = float(facts["scale"]), int(facts["good_steps"])
