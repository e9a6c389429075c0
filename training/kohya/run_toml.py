"""Write an explanation's settings as a run.toml, each key with the flags that it comes from. No torch."""

from collections.abc import Container

from sharding.config import ConfigError, parse_config
from training.config import RunConfig
from training.kohya.explanation import Explanation, shown
from training.kohya.setting import Setting

_LINE_LENGTH = 120


def run_toml(explanation: Explanation) -> str:
    """Return the file's text. Raises ConfigError with every reason why the settings cannot be a run."""
    if not explanation.has_recipe:
        raise ConfigError(f"{explanation.script}.py trains Stable Diffusion; its recipe is still to come")
    if explanation.problems:
        raise ConfigError("; ".join(f"--{one.flag}: {one.text}" for one in explanation.problems))
    parse_config(explanation.values(), RunConfig, name="this command")
    lines = [
        f"# From a command for kohya's {explanation.script}.py, by `python -m training explain-kohya`.",
        "# --flag: where a value comes from. Keys that are not here have this project's defaults.",
    ]
    table = None
    for setting in explanation.settings:
        head, _, last = setting.key.rpartition(".")
        if head != table:
            lines += ["", f"[{head}]"] if head else [""]
            table = head
        lines += _lines(last, setting, _comment(setting, explanation.given))
    return "\n".join(lines) + "\n"


def _comment(setting: Setting, given: Container[str]) -> str:
    flags = ", ".join(f"--{name}" for name in setting.flags if name in given)
    if setting.flags and not flags:
        flags = f"without --{setting.flags[0]}"
    return ": ".join(part for part in (flags, setting.why) if part)


def _lines(key: str, setting: Setting, comment: str) -> list[str]:
    line = f"{'# ' * setting.is_off}{key} = {shown(setting.value)}"
    if not comment:
        return [line]
    if len(line) + len(comment) + 4 <= _LINE_LENGTH and "\n" not in line:
        return [f"{line}  # {comment}"]
    return [f"# {comment}", line]
