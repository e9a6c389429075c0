"""What a command becomes: settings of run.toml, each with the flags it comes from, and what has no place there."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Setting:
    """One key of run.toml."""

    key: str
    """Dotted."""
    value: Any
    flags: tuple[str, ...] = ()
    """Names of the flags it comes from; none: kohya has none for it."""
    why: str = ""
    """For a comment; "" where key and flag say it all."""
    is_off: bool = False
    """Written as a comment: what the flag says, but kohya did not do."""


@dataclass(frozen=True)
class Problem:
    """What cannot be done as it was. keys: of which one, given with --set, settles it."""

    flag: str
    text: str
    keys: tuple[str, ...] = ()


@dataclass
class Translation:
    """Settings in the order they were found, and problems."""

    settings: list[Setting] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def put(self, key: str, value: Any, *flags: str, why: str = "", is_off: bool = False) -> None:
        """Add a setting."""
        self.settings.append(Setting(key, value, flags, why, is_off))

    def take_out(self, key: str) -> None:
        """Forget a setting."""
        self.settings = [one for one in self.settings if one.key != key]

    def refuse(self, flag: str, text: str, *keys: str) -> None:
        """Add a problem."""
        self.problems.append(Problem(flag, text, keys))
