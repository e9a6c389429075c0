"""The settings of a run. Each table's class says in FREE which of its keys may change between launches."""

from training.config.run import FREE_KEYS, GROWING_KEYS, RunConfig
from training.config.watching import Prompt

__all__ = ["FREE_KEYS", "GROWING_KEYS", "Prompt", "RunConfig"]
