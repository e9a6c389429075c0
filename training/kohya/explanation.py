"""What a kohya command means here: a row for each flag, settings of run.toml, and the commands that go with it.

    explain(given)  →  Explanation: rows, settings, problems, unknown flags, commands

The file is written in `run_toml`, the table in `printed`; commands are read in `sources`. No torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sharding.config import apply_override
from training.commented_toml import shown
from training.config import RunConfig
from training.kohya.dreambooth_settings import dreambooth_settings
from training.kohya.flag_table import OF_THE_BRANCH, SCRIPTS, Flag, launcher_flags, trainer_flags
from training.kohya.following import following_commands
from training.kohya.given import Given, Unknown
from training.kohya.run_settings import stage_c_settings
from training.kohya.setting import Problem, Setting


@dataclass(frozen=True)
class Row:
    """A flag as it was given, what it is here (settings first), and what kohya did with it."""

    flag: str
    value: str
    here: tuple[str, ...]
    kohya: str


@dataclass(frozen=True)
class Explanation:
    """Everything there is to say about a command."""

    script: str
    """File name without .py."""
    given: frozenset[str]
    """Names of the flags in the command; the others of a setting's flags have kohya's default."""
    rows: tuple[Row, ...]
    settings: tuple[Setting, ...]
    """In the order of run.toml; those with `is_off` are comments in it."""
    without_flag: tuple[Setting, ...]
    """What kohya does although no flag says so."""
    unknown: tuple[Unknown, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    commands: tuple[str, ...]

    def values(self) -> dict[str, Any]:
        """Return the settings as nested tables."""
        tables: dict[str, Any] = {}
        for setting in self.settings:
            if not setting.is_off:
                *path, last = setting.key.split(".")
                table = tables
                for name in path:
                    table = table.setdefault(name, {})
                table[last] = setting.value
        return tables


def explain(
    given: Given, *, workspace: str, chunks: str, overrides: Sequence[str] = (), run_toml: str = "run.toml"
) -> Explanation:
    """Explain a command. workspace, chunks: what [data] is to name. overrides: `key=value`, over what is found.

    run_toml: the settings' file in the commands that follow.

    Raises ConfigError for an override that is none.
    """
    translate = stage_c_settings if given.script in OF_THE_BRANCH else dreambooth_settings
    found = translate(given, workspace=workspace, chunks=chunks)
    changed = dict(_override(override) for override in overrides)
    kept = [one for one in found.settings if one.is_off or one.key not in changed]
    settings = sorted([*kept, *(Setting(key, value, why="--set") for key, value in changed.items())], key=_place)
    return Explanation(
        script=next(name for name, script in SCRIPTS.items() if script == given.script),
        given=frozenset([*given.flags, *given.launcher]),
        rows=tuple(_rows(given, settings)),
        settings=tuple(settings),
        without_flag=tuple(one for one in kept if not one.flags),
        unknown=tuple(given.unknown),
        problems=(
            *(Problem(flag, text) for flag, text in given.missing.items()),
            *(one for one in found.problems if not changed.keys() & set(one.keys)),
        ),
        notes=tuple(given.notes),
        commands=tuple(following_commands(given, workspace=workspace, chunks=chunks, run_toml=run_toml)),
    )


def _override(override: str) -> tuple[str, Any]:
    value: Any = {}
    apply_override(value, override)
    key = override.partition("=")[0].strip()
    for name in key.split("."):
        value = value[name]
    return key, value


def _place(setting: Setting) -> tuple[int, str]:
    """Sort as RunConfig has its tables; plain keys first, a table's own keys before its tables."""
    head, _, _ = setting.key.rpartition(".")
    order = list(RunConfig.model_fields)
    first = head.split(".")[0]
    return (order.index(first) if first in order else len(order)) if head else -1, head


def _rows(given: Given, settings: Sequence[Setting]) -> list[Row]:
    rows = [
        Row(name, value, ("Belongs to the shell; it stands in front of the new command, too.",), "Nothing of its own.")
        for name, value in given.environment.items()
    ]
    for name, value in given.launcher.items():
        own = [] if name in trainer_flags() else [one for one in settings if name in one.flags]
        rows.append(_row(f"accelerate --{name}", value, launcher_flags()[name], given, own))
    for name, value in given.flags.items():
        source = f" ({given.sources[name]})" if name in given.sources else ""
        own = [one for one in settings if name in one.flags]
        rows.append(_row(f"--{name}{source}", value, trainer_flags()[name], given, own))
    return rows


def _row(title: str, value: Any, flag: Flag, given: Given, own: Sequence[Setting]) -> Row:
    here = [f"{'# ' * one.is_off}{one.key} = {shown(one.value)}" for one in own]
    if not own and (key := flag.meant_by(given.script)).startswith("dreambooth."):
        here.append(f"about {key}")
    whys = dict.fromkeys(one.why for one in own if one.why)
    is_bare = flag.kind == "switch" and value is True
    written = "" if is_bare else " ".join(value) if isinstance(value, list) else str(value)
    return Row(title, written, (*here, flag.here, *(f"({why})" for why in whys)), flag.done_by(given.script))
