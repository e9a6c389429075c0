"""What most subcommands share: the run's settings, its folder, --set, --dry-run."""

import argparse
from pathlib import Path

from sharding.config import load_config
from training.config import RunConfig


def add_run_arguments(
    parser: argparse.ArgumentParser, *, needs_config: bool = True, needs_run_dir: bool = True
) -> None:
    """Add RUN.toml, --run-dir and --set. needs_config: without it the run's own frozen settings are taken."""
    config = parser.add_argument("config", type=Path, metavar="RUN.toml", help="settings of the run")
    if not needs_config:
        config.nargs = "?"
        config.required = False
    parser.add_argument("--run-dir", type=Path, required=needs_run_dir, help="folder of the run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")


def run_config(options: argparse.Namespace) -> RunConfig:
    """Read the given settings, or the run's own frozen ones. Raises ConfigError, FileNotFoundError."""
    path = options.config if options.config is not None else options.run_dir / "run.toml"
    if options.config is None and not path.exists():
        raise FileNotFoundError(
            f"{path}: not there, so no run was started in {options.run_dir}; name another --run-dir"
        )
    return load_config(path, RunConfig, options.overrides)


def run_config_if_any(options: argparse.Namespace) -> RunConfig | None:
    """Read the given settings, or the run's own; None when neither a file nor a run is named."""
    return None if options.config is None and options.run_dir is None else run_config(options)
