"""What a command gives to a trainer of kohya's: its flags with values, and what is in the files that they name.

As kohya reads them: flags of the command before those of --config_file; a --dataset_config before both. What no
table knows is kept, too. What the values mean here is `settings`'. No torch.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sharding.config import ConfigError, read_toml
from training.kohya.flag_table import Flag, Script, launcher_flags, trainer_flags

_OF_DATASET = {"batch_size": "train_batch_size", "num_repeats": "dataset_repeats"}
_PLACES = {"image_dir", "metadata_file", "is_reg", "class_tokens", "conditioning_data_dir", "subsets", "datasets"}


@dataclass(frozen=True)
class Unknown:
    """A flag that the tables do not have. hint: what might be meant, or ""."""

    name: str
    value: str
    hint: str


@dataclass
class Given:
    """Flags by name with their values, of trainer and launcher, and what could not be understood."""

    script: Script
    environment: dict[str, str] = field(default_factory=dict)
    launcher: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    """Of each flag: "" is the command, else a file."""
    unknown: list[Unknown] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    """By flag: a file with settings that is not there."""

    def value(self, name: str) -> Any:
        """Return a flag's value, kohya's default when it is not given; None when there is none."""
        return self.flags.get(name, trainer_flags()[name].default)

    def has(self, *names: str) -> bool:
        """Tell whether one of the flags is given, a switch: on."""
        return any(self.flags.get(name) not in (None, False) for name in names)

    def take(self, values: Mapping[str, Any], *, source: str, wins: bool) -> None:
        """Add flags from a file. wins: over those that are there already."""
        for name, value in values.items():
            if name in trainer_flags():
                if value is not None and (wins or name not in self.flags):
                    self.flags[name] = trainer_flags()[name].read(name, value)
                    self.sources[name] = source
            else:
                hint = _nearest(name, trainer_flags())
                self.unknown.append(Unknown(name, f"{value}", f"in {source}; kohya takes it without a word{hint}"))


def read_arguments(words: Sequence[str], given: Given) -> None:
    """Add the flags of a trainer's command line. Raises ConfigError for a value of the wrong kind or none at all."""
    known = {name: flag for name, flag in trainer_flags().items() if flag.is_in(given.script)}
    _read_words(words, trainer_flags(), given.flags, given.unknown, preferred=known)


def read_launcher(words: Sequence[str], given: Given) -> None:
    """Add the flags of `accelerate launch`. Other launchers' flags are unknown ones."""
    place = next((number for number, word in enumerate(words) if word.startswith("-")), len(words))
    _read_words(words[place:], launcher_flags(), given.launcher, given.unknown, preferred=launcher_flags())


def _read_words(
    words: Sequence[str],
    flags: Mapping[str, Flag],
    values: dict[str, Any],
    unknown: list[Unknown],
    *,
    preferred: Mapping[str, Flag],
) -> None:
    """Read `--name value`, `--name=value` and switches. preferred: among which an abbreviation is looked up."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        written, equals, after = word.removeprefix("--").partition("=")
        following = [after] if equals else []
        while not equals and rest and not _is_flag(rest[0]):
            following.append(rest.pop(0))
        name = _full_name(written, flags, preferred)
        if not word.startswith("--") or name is None:
            title = word.partition("=")[0] if equals else word
            unknown.append(Unknown(title, " ".join(following), _nearest(written, flags).removeprefix("; ")))
            continue
        flag = flags[name]
        if flag.kind == "switch":
            values[name] = True
            unknown += [
                Unknown(one, "", f"stands behind the switch --{name}, which takes no value") for one in following
            ]
            continue
        if flag.kind != "words" and not following:
            raise ConfigError(f"--{name}: its value is missing")
        values[name] = flag.read(name, following if flag.kind == "words" else following[:1])
        if flag.kind != "words":
            unknown += [Unknown(one, "", f"a second value of --{name}") for one in following[1:]]


def _is_flag(word: str) -> bool:
    if not word.startswith("-") or len(word) < 2:
        return False
    try:
        float(word)
    except ValueError:
        return True
    return False


def _full_name(written: str, flags: Mapping[str, Flag], preferred: Mapping[str, Flag]) -> str | None:
    """Return a flag's name; argparse takes any beginning that only one flag has."""
    if written in flags:
        return written
    starting = [name for name in preferred if written and name.startswith(written)]
    return starting[0] if len(starting) == 1 else None


def _nearest(name: str, flags: Mapping[str, Flag]) -> str:
    near = difflib.get_close_matches(name, flags, n=1)
    return f"; is --{near[0]} meant?" if near else ""


# --- files ---


def read_config_file(path: Path) -> dict[str, Any]:
    """Return the values of kohya's --config_file: sections have no meaning. Raises ConfigError, FileNotFoundError."""
    if path.suffix != ".toml":
        path = path.with_name(path.name + ".toml")
    values: dict[str, Any] = {}
    for key, value in read_toml(path).items():
        values.update(value if isinstance(value, dict) else {key: value})
    return values


def read_dataset_config(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return what all subsets of a --dataset_config agree on, under the flags' names, and notes on the rest.

    [general], [[datasets]] and [[datasets.subsets]] inherit from the one before. Raises ConfigError.
    """
    tables = read_json(path) if path.suffix.lower() == ".json" else read_toml(path)
    subsets: list[dict[str, Any]] = []
    general = tables.get("general", {})
    for dataset in tables.get("datasets", []):
        for subset in dataset.get("subsets", []):
            subsets.append({**general, **dataset, **subset})
    if not subsets:
        raise ConfigError(f"{path}: has no [[datasets.subsets]]")
    names = dict.fromkeys(name for subset in subsets for name in subset if name not in _PLACES)
    agreed: dict[str, Any] = {}
    notes = []
    for name in names:
        values = [subset.get(name) for subset in subsets]
        if name == "num_repeats":
            notes.append(f"{path.name}: num_repeats become [[plan.weights]] of the dataset.toml")
        elif all(value == values[0] for value in values):
            agreed[_OF_DATASET.get(name, name)] = values[0]
        else:
            shown = ", ".join(str(value) for value in dict.fromkeys(map(repr, values)))
            notes.append(f"{path.name}: subsets differ in {name} ({shown}); a run has one: choose it with --set")
    return agreed, notes


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises ConfigError, FileNotFoundError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must be an object of settings")
    return values
