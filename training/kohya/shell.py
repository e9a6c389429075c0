"""Find the one training command in a piece of shell, and take it apart into words.

Understands what people paste: line continuations of sh, cmd and PowerShell, quotes, comments, `cd … &&` in front,
variables set on lines before. It runs nothing. No torch.
"""

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PureWindowsPath

from sharding.config import ConfigError
from training.kohya.flag_table import SCRIPTS

_CONTINUED = re.compile(r"[ \t]*[\\^`][ \t]*\r?\n")
_DRIVE = re.compile(r"(?:^|[\s\"'=])[A-Za-z]:\\")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_ENDS = ";&|\n"


@dataclass(frozen=True)
class ShellCommand:
    """A training command in words."""

    environment: Mapping[str, str]
    """Variables set in front of it."""
    launcher: tuple[str, ...]
    """What stands before the script: `accelerate launch --num_processes 8`, `python`."""
    script: str
    """File name of the script, without folder and .py."""
    arguments: tuple[str, ...]


def read_shell(text: str) -> ShellCommand:
    """Return the command in `text` that starts a trainer of kohya's.

    Raises ConfigError when there is none, or more than one, or quotes do not close.
    """
    statements = _statements(text)
    found = [words for words in statements if any(_script_of(word) in SCRIPTS for word in words)]
    if not found:
        scripts = [word for words in statements for word in words if word.endswith(".py")]
        seen = f"found {', '.join(scripts)}" if scripts else "found no .py file"
        raise ConfigError(f"no command of a known trainer: {seen}; known are {', '.join(f'{s}.py' for s in SCRIPTS)}")
    if len(found) > 1:
        raise ConfigError(f"{len(found)} training commands; explain them one at a time")
    variables = _variables(statements)
    words = [_expanded(word, variables) for word in found[0]]
    place = next(number for number, word in enumerate(words) if _script_of(word) in SCRIPTS)
    environment: dict[str, str] = {}
    start = 0
    while (assignment := _ASSIGNMENT.fullmatch(words[start])) or words[start] in ("env", "export", "set"):
        if assignment:
            environment[assignment[1]] = assignment[2]
        start += 1
    return ShellCommand(environment, tuple(words[start:place]), _script_of(words[place]), tuple(words[place + 1 :]))


def _script_of(word: str) -> str:
    """Return the name of a Python file or module, without folders."""
    name = PureWindowsPath(word).name  # knows both slashes
    return name.removesuffix(".py")


def _statements(text: str) -> list[list[str]]:
    """Split a script into statements of words; comments and operators are left out."""
    joined = _CONTINUED.sub(" ", text.strip() + "\n")
    lines = [line for line in joined.splitlines() if not line.lstrip().startswith(("#", "::", "REM "))]
    has_escapes = _DRIVE.search(joined) is None  # else they are backslashes of Windows paths
    return [words for part in _parts("\n".join(lines), has_escapes) if (words := _words(part, has_escapes))]


def _parts(text: str, has_escapes: bool) -> Iterator[str]:
    """Yield what stands between operators and line ends that are not in quotes."""
    quote, start, place = "", 0, 0
    while place < len(text):
        letter = text[place]
        if letter == "\\" and has_escapes and quote != "'":
            place += 1
        elif quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in _ENDS:
            yield text[start:place]
            start = place + 1
        place += 1
    yield text[start:]


def _words(part: str, has_escapes: bool) -> list[str]:
    lexer = shlex.shlex(part, posix=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    if not has_escapes:
        lexer.escape = ""
    try:
        return list(lexer)
    except ValueError as error:
        raise ConfigError(f"the command cannot be read: {str(error).lower()}; a quote is open") from None


def _variables(statements: list[list[str]]) -> dict[str, str]:
    variables: dict[str, str] = {}
    for words in statements:
        rest = words[1:] if words[0] in ("export", "set") else words
        assignments = [_ASSIGNMENT.fullmatch(word) for word in rest]
        if all(assignments):
            for assignment in assignments:
                assert assignment is not None
                variables[assignment[1]] = _expanded(assignment[2], variables)
    return variables


def _expanded(word: str, variables: Mapping[str, str]) -> str:
    """Put in variables that are known; others stay as they are written."""
    return _VARIABLE.sub(lambda found: variables.get(found[1] or found[2], found[0]), word)
