"""A part of a picture, as shares of its sides; what a detector says is in it."""

from dataclasses import dataclass

PERSON, FACE = "person", "face"
"""Labels that rules are asked of; others are kept in the report only."""


@dataclass(frozen=True)
class Box:
    """Sides from 0 to 1 of the picture's. score: how sure the detector is."""

    label: str
    left: float
    top: float
    right: float
    bottom: float
    score: float = 1.0

    @property
    def area(self) -> float:
        return max(0.0, self.right - self.left) * max(0.0, self.bottom - self.top)

    def shared(self, other: "Box") -> float:
        """Return the area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)
