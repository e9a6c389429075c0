"""How often what is shown: class images rotated over epochs, concepts balanced. Pure."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """A sample is shown `repeats` times in the epochs e with e % every == offset."""

    every: int = 1
    offset: int = 0
    repeats: int = 1


def class_turns(num_images: int, num_showings: int) -> list[Turn]:
    """Return the turns of class images, so that every epoch has exactly num_showings of them.

    Where there are more images, neighbours take turns, and after `every` epochs each was shown. The showings of an
    epoch are shared out as evenly as whole repeats allow. Both numbers must be at least 1.
    """
    every = math.ceil(num_images / num_showings)
    turns = []
    for offset in range(every):
        start, end = (-(-number * num_images // every) for number in (offset, offset + 1))
        repeats, more = divmod(num_showings, end - start)
        turns += [Turn(every, offset, repeats + (number < more)) for number in range(end - start)]
    return turns


def balanced_repeats(num_pictures: Mapping[str, int]) -> dict[str, int]:
    """Return the repeats of each concept with which it is shown about as often as the largest one, which has 1.

    num_pictures: at least 1 of each. Of two neighbours the one with the nearer ratio is taken, so no concept is shown
    more than √2 times as often, or as seldom, as the largest.
    """
    most = max(num_pictures.values())

    def ratio(times: int, number: int) -> float:
        return max(times * number, most) / min(times * number, most)

    return {
        name: min((most // number, most // number + 1), key=lambda times: ratio(times, number))
        for name, number in num_pictures.items()
    }
