"""Run the project's own commands one after the other, as a person would type them."""

import shlex
import subprocess
import sys
from collections.abc import Sequence

PYTHON = [sys.executable, "-m"]


def shown(command: Sequence[str]) -> str:
    """Return a command as one would type it."""
    words = ["python" if word == sys.executable else word for word in command]
    return shlex.join(words)


def run(command: Sequence[str]) -> int:
    """Print a command, run it in the foreground, return its exit code."""
    print(f"\n$ {shown(command)}", flush=True)
    return subprocess.run(list(command), check=False).returncode


def run_all(commands: Sequence[Sequence[str]]) -> int:
    """Run commands in order; stop at the first that fails and return its exit code, else 0."""
    for command in commands:
        if code := run(command):
            print(f"stopped: `{shown(command)}` ended with exit code {code}", file=sys.stderr)
            return code
    return 0
