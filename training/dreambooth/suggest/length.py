"""How long to train: epochs from the number of pictures, and intervals from the number of steps. Pure.

The wiki: under 15 pictures over 100 epochs, around 80 is ideal, more pictures need fewer; its two stages have 35
and 65.
"""

import math
from dataclasses import dataclass

FEW, ENOUGH = 15, 30
"""Pictures of a concept: below the first they are few, up to the second as the wiki advises."""
EPOCHS_OF_FEW, EPOCHS, LEAST_EPOCHS = 120, 80, 50
"""The last: the wiki's cure for under-training is more than 50."""
STAGE_SHARES = (0.35, 0.65)
_STAGED_FACTOR = 100 / 80
"""The wiki's stages are 100 epochs where its plain run has 80."""
_EPOCHS_BETWEEN = 10


@dataclass(frozen=True)
class Length:
    """stages: epochs of each, one number where there are no stages."""

    stages: tuple[int, ...]
    why: str

    @property
    def epochs(self) -> int:
        """Return all epochs."""
        return sum(self.stages)


def length_for(num_pictures: int, *, is_staged: bool) -> Length:
    """Return the epochs for a concept that an epoch shows so many pictures of."""
    if num_pictures < FEW:
        epochs, why = EPOCHS_OF_FEW, f"wiki: over 100 where there are less than {FEW} pictures"
    elif num_pictures <= ENOUGH:
        epochs, why = EPOCHS, "wiki: around 80 is ideal"
    else:
        epochs = max(LEAST_EPOCHS, round(EPOCHS * ENOUGH / num_pictures / 5) * 5)
        why = f"wiki: fewer with more than {ENOUGH} pictures; exposures as of {ENOUGH}, at least {LEAST_EPOCHS}"
    if not is_staged:
        return Length((epochs,), why)
    total = round(epochs * _STAGED_FACTOR)
    first = round(total * STAGE_SHARES[0])
    return Length((first, total - first), "wiki: 35 and 65" if total == 100 else f"{why}; 35 to 65 in stages")


def steps_between(num_showings: int, batch_size: int) -> int:
    """Return the steps of ten epochs: how often to save a state and draw pictures."""
    return _EPOCHS_BETWEEN * math.ceil(num_showings / batch_size)
