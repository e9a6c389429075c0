"""What a run depends on besides its config, in run.json: the machine that decides bits, weights that no state holds."""

import logging
import platform
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sharding.config import ConfigError
from training.run_dir import RunDir

logger = logging.getLogger(__name__)


def machine_facts(*, num_processes: int, device: torch.device, num_threads: int, exact: bool) -> dict[str, Any]:
    """Return what a run's bits depend on besides its config."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"CPU {platform.processor() or platform.machine()}"
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "num_threads": num_threads,
        "exact": exact,
        "devices": f"{num_processes} x {name}",
    }


def command_line(arguments: Sequence[str], *, num_processes: int) -> str | None:
    """Return a launch's command for a shell, as model cards show it; a webhook, which may hold a secret, is not in it.

    arguments: those of `python -m training`; None when they are another program's.
    """
    if list(arguments[:1]) != ["run"]:
        return None
    shown: list[str] = []
    for word in arguments:
        if "trackers.webhook=" not in word:
            shown.append(word)
        elif shown and shown[-1] == "--set":
            shown.pop()
    launcher = f"accelerate launch --num_processes {num_processes} -m" if num_processes > 1 else "python -m"
    return f"{launcher} training {shlex.join(shown)}"


def record_machine(run_dir: RunDir, now: Mapping[str, Any]) -> dict[str, Any]:
    """Put a launch's facts into run.json, say aloud what changed since the last launch, and return all of it."""
    before = run_dir.read_run_json()
    if changes := [f"{key} {before[key]} -> {now[key]}" for key in now if before.get(key, now[key]) != now[key]]:
        logger.warning("since the last launch: %s; the same images, but not the same bits", ", ".join(changes))
    return run_dir.update_run_json(**now)


def require_same_frozen_weights(run_dir: RunDir, now: Mapping[str, str]) -> None:
    """Raise ConfigError when a weights file that no state holds was changed: its path is free, its values not.

    now: digests by config key. Those of a run's first launch go into run.json.
    """
    before = run_dir.read_run_json().get("frozen_weights", {})
    if changed := [key for key, digest in now.items() if before.get(key, digest) != digest]:
        raise ConfigError(
            f"{', '.join(changed)}: not what this run was started with (run.json, frozen_weights); "
            "give the same weights, or start a new run folder"
        )
    run_dir.update_run_json(frozen_weights={**before, **now})
