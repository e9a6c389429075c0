"""Write an explanation's settings as a run.toml, each key with the flags that it comes from. No torch."""

from collections.abc import Container

from sharding.config import ConfigError, parse_config
from training.commented_toml import Line, commented_toml
from training.config import RunConfig
from training.kohya.explanation import Explanation
from training.kohya.setting import Setting


def run_toml(explanation: Explanation) -> str:
    """Return the file's text. Raises ConfigError with every reason why the settings cannot be a run."""
    if explanation.problems:
        raise ConfigError("; ".join(f"--{one.flag}: {one.text}" for one in explanation.problems))
    parse_config(explanation.values(), RunConfig, name="this command")
    head = (
        f"From a command for kohya's {explanation.script}.py, by `python -m training explain-kohya`.",
        "--flag: where a value comes from. Keys that are not here have this project's defaults.",
    )
    lines = (
        Line(one.key, one.value, _comment(one, explanation.given), is_off=one.is_off) for one in explanation.settings
    )
    return commented_toml(lines, head=head)


def _comment(setting: Setting, given: Container[str]) -> str:
    flags = ", ".join(f"--{name}" for name in setting.flags if name in given)
    if setting.flags and not flags:
        flags = f"without --{setting.flags[0]}"
    return ": ".join(part for part in (flags, setting.why) if part)
