"""Read a kohya command from where it stands: the command line, a script, a --config_file, the GUI's JSON. No torch."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sharding.config import ConfigError
from training.kohya.flag_table import SCRIPTS, Script
from training.kohya.given import Given, read_arguments, read_config_file, read_dataset_config, read_json, read_launcher
from training.kohya.gui import is_gui_config, read_gui, script_of_gui
from training.kohya.shell import read_shell

__all__ = ["given_by_command", "given_by_file"]


def given_by_command(text: str) -> Given:
    """Return what a command line or a shell script with one gives, and the files that it names.

    A --config_file or --dataset_config that is not there is in `missing`. Raises ConfigError.
    """
    command = read_shell(text)
    given = Given(SCRIPTS[command.script], environment=dict(command.environment))
    read_launcher(command.launcher, given)
    read_arguments(command.arguments, given)
    if path := given.value("config_file"):
        with _noting(given, "config_file"):
            given.take(read_config_file(Path(path)), source=f"{Path(path).name.removesuffix('.toml')}.toml", wins=False)
    return _with_dataset_config(given)


def given_by_file(path: Path, *, script: str | None = None) -> Given:
    """Return what a file without a command gives: a --config_file's TOML, or the JSON that the kohya_ss GUI saves.

    script: file name of the trainer, with or without .py; guessed from the flags when None. Raises as
    `given_by_command`.
    """
    if script is not None and script.removesuffix(".py") not in SCRIPTS:
        raise ConfigError(f"--script {script}: not known; known are {', '.join(SCRIPTS)}")
    own = SCRIPTS[script.removesuffix(".py")] if script is not None else None
    if path.suffix.lower() != ".json":
        values = read_config_file(path)
        given = Given(own or _script_of(values))
        given.take(values, source=path.name, wins=False)
        return _with_dataset_config(given)
    values = read_json(path)
    given = Given(own or script_of_gui(values))
    if is_gui_config(values):
        read_gui(values, given, source=path.name)
    else:
        given.take(values, source=path.name, wins=False)
    return _with_dataset_config(given)


def _script_of(values: Mapping[str, Any]) -> Script:
    is_network = "network_module" in values
    if "stage_c_checkpoint_path" in values:
        return "stage_c_network" if is_network else "stage_c"
    if is_network:
        return "network"
    return "fine_tune" if "in_json" in values else "db"


def _with_dataset_config(given: Given) -> Given:
    if path := given.value("dataset_config"):
        with _noting(given, "dataset_config"):
            values, notes = read_dataset_config(Path(path))
            given.take(values, source=Path(path).name, wins=True)
            given.notes += notes
    return given


@contextmanager
def _noting(given: Given, flag: str) -> Iterator[None]:
    """Note that a flag's file is not there: what else the command says can still be explained."""
    try:
        yield
    except FileNotFoundError:
        given.missing[flag] = f"{given.value(flag)} is not here, and what it says is not above"
