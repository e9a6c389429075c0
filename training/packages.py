"""Packages that only some settings need, asked for before networks are loaded. No torch; imports none of them.

That one is there does not mean that it works on this machine: bitsandbytes says so itself when it is used.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import NamedTuple

from sharding.config import ConfigError
from training.config import RunConfig


class Need(NamedTuple):
    """A setting that needs a package, and the extra of this project that brings it."""

    setting: str
    package: str
    extra: str

    def __str__(self) -> str:
        return f"{self.setting} needs the package {self.package}: run `pip install -e '.[{self.extra}]'`"


def missing_packages(config: RunConfig) -> list[Need]:
    """Return what the settings need and this Python has not."""
    return [need for need in _needs(config) if find_spec(need.package) is None]


def require_packages(config: RunConfig) -> None:
    """Raise ConfigError naming every missing package with the setting that needs it."""
    if missing := missing_packages(config):
        raise ConfigError("; ".join(map(str, missing)))


def _needs(config: RunConfig) -> Iterator[Need]:
    optimizer, strategy = config.optimizer.name, config.parallel.strategy
    optimizers = {"prodigy": ("prodigyopt", "optimizers"), "schedule_free": ("schedulefree", "optimizers")}
    if optimizer.endswith("8bit"):
        optimizers[optimizer] = ("bitsandbytes", "gpu")
    if optimizer in optimizers:
        yield Need(f'optimizer.name "{optimizer}"', *optimizers[optimizer])
    if strategy.startswith("zero"):
        yield Need(f'parallel.strategy "{strategy}"', "deepspeed", "gpu")
    if config.trackers.wandb != "off":
        yield Need(f'trackers.wandb "{config.trackers.wandb}"', "wandb", "train")
    if config.trackers.tensorboard:
        yield Need("trackers.tensorboard", "tensorboard", "train")
