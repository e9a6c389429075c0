"""Every flag of kohya's trainers and of `accelerate launch`: what it is, what kohya does with it, what it means here.

Read from flags.toml and launcher.toml beside this file; their first lines say what the entries are. No torch.
"""

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from sharding.config import Config, ConfigError, parse_config

Kind = Literal["switch", "int", "float", "number", "text", "words"]
Script = Literal["stage_c", "stage_c_network", "db", "fine_tune", "network", "sdxl", "sdxl_network"]

SCRIPTS: Mapping[str, Script] = {
    "stable_cascade_train_stage_c": "stage_c",
    "stable_cascade_train_c_network": "stage_c_network",
    "train_db": "db",
    "fine_tune": "fine_tune",
    "train_network": "network",
    "sdxl_train": "sdxl",
    "sdxl_train_network": "sdxl_network",
}
"""File names, without .py, of the trainers that are known."""
OF_THE_BRANCH: tuple[Script, ...] = ("stage_c", "stage_c_network")
"""Scripts of the stable-cascade branch."""


class Flag(Config):
    """One flag, as flags.toml says it."""

    kind: Kind
    default: bool | int | float | str | None = None
    only: tuple[Script, ...] = ()
    main: bool = False
    key: str = ""
    to: str = ""
    here: str
    kohya: str
    branch: str = ""
    gui: str = ""

    def is_in(self, script: Script) -> bool:
        """Tell whether a script has this flag; argparse refuses those it has not."""
        if self.only and script not in self.only:
            return False
        return not (self.main and script in OF_THE_BRANCH)

    def done_by(self, script: Script) -> str:
        """Return what a script did with it."""
        if not self.is_in(script):
            return f"This script has no such flag: it ends with an error. ({self.kohya})"
        return self.branch if self.branch and script in OF_THE_BRANCH else self.kohya

    def meant_by(self, script: Script) -> str:
        """Return the dotted key of run.toml that a script's flag is about; "" when it is about none."""
        if script in OF_THE_BRANCH:
            return self.key
        return self.to or ("" if self.key.startswith("stage_c.") else self.key)

    def read(self, name: str, words: Any) -> Any:
        """Return a value as argparse would. words: one text, a list of them, or a value from a TOML or JSON.

        Raises ConfigError naming the flag.
        """
        if self.kind == "words":
            return [str(word) for word in words] if isinstance(words, list) else str(words).split()
        value = words[0] if isinstance(words, list) and len(words) == 1 else words
        if self.kind == "text":
            return ",".join(str(one) for one in value) if isinstance(value, list) else str(value)
        if self.kind == "switch":
            if not isinstance(value, bool):
                raise ConfigError(f"--{name}: is a switch, got the value {value!r}")
            return value
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ConfigError(f"--{name}: must be a number, got {value!r}") from None
        if self.kind == "float":
            return number
        if self.kind == "int" and not number.is_integer():
            raise ConfigError(f"--{name}: must be a whole number, got {value!r}")
        return int(number) if number.is_integer() else number


@cache
def trainer_flags() -> Mapping[str, Flag]:
    """Return the flags of kohya's trainers by name, without `--`."""
    return _read("flags.toml")


@cache
def launcher_flags() -> Mapping[str, Flag]:
    """Return the flags of `accelerate launch` by name, without `--`."""
    return _read("launcher.toml")


def _read(name: str) -> dict[str, Flag]:
    tables = tomllib.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))
    return {flag: parse_config(table, Flag, name=f"{name}: {flag}") for flag, table in tables.items()}
