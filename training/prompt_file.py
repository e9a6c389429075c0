"""Prompts of previews as kohya's trainers read them from a .txt, .toml or .json file.

What kohya draws anew each time is fixed here: a prompt without a seed has one made from its text. What kohya passes
over in silence (an unknown option, a size or sampler that the model does not have) is an error. No torch.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sharding.config import ConfigError, parse_config, read_toml
from training.config import Prompt

_OPTION = re.compile(r"\s--(?=[A-Za-z]+(?:\s|$))")
_OPTIONS = {
    "n": "negative", "w": "width", "h": "height", "d": "seed", "s": "steps", "l": "guidance", "ss": "sampler",
}  # fmt: skip
_KEYS = {
    "prompt": "text", "negative_prompt": "negative", "width": "width", "height": "height", "seed": "seed",
    "sample_steps": "steps", "scale": "guidance", "sample_sampler": "sampler",
}  # fmt: skip


def read_prompts(path: Path, *, problems: Callable[[Prompt], list[str]]) -> tuple[Prompt, ...]:
    """Return the prompts of a file in its order.

        masterpiece, 1girl --n bad hands --w 832 --h 1216 --d 42 --l 4.5 --s 28 --ss ddpm      # a line of a .txt
        [prompt] with defaults and [[prompt.subset]] tables (.toml); a list of objects (.json)

    problems: says why a recipe cannot draw a prompt. Lines of a .txt that begin with # are comments. Seeds that are
    missing or negative are made from the text: the same at every launch, another for a second prompt of that text.
    Raises ConfigError naming the line or the prompt, FileNotFoundError.
    """
    readers = {".txt": _read_txt, ".toml": _read_toml, ".json": _read_json}
    if path.suffix.lower() not in readers:
        raise ConfigError(f"preview.file {path}: must end in {', '.join(readers)}")
    prompts, texts = [], Counter[str]()
    for where, values in readers[path.suffix.lower()](path):
        text = str(values.get("text", ""))
        texts[text] += 1
        if _has_no_seed(values):
            values = {**values, "seed": _seed_of(text, texts[text])}
        prompt = parse_config(values, Prompt, name=where)
        if found := problems(prompt):
            raise ConfigError(f"{where}: {'; '.join(found)}")
        prompts.append(prompt)
    if not prompts:
        raise ConfigError(f"preview.file {path}: there is no prompt in it")
    return tuple(prompts)


def _has_no_seed(values: Mapping[str, Any]) -> bool:
    try:
        return int(values.get("seed", -1)) < 0
    except (TypeError, ValueError):
        return False  # not a number: the settings say so


def _seed_of(text: str, occurrence: int) -> int:
    digest = hashlib.blake2b(json.dumps([text, occurrence]).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def _read_txt(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if line.strip() and not line.startswith("#"):
            yield f"{path}: line {number}", _parse_line(f"{path}: line {number}", line.strip())


def _parse_line(where: str, line: str) -> dict[str, Any]:
    text, *options = _OPTION.split(" " + line)
    values: dict[str, Any] = {"text": text.strip()}
    for option in options:
        name, _, value = option.partition(" ")
        if name.lower() not in _OPTIONS:
            known = " ".join(f"--{each}" for each in _OPTIONS)
            raise ConfigError(f"{where}: option --{name} is not known here; known are {known}")
        values[_OPTIONS[name.lower()]] = value.strip()
    return values


def _read_toml(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    table = read_toml(path).get("prompt")
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: there is no table [prompt]")
    subsets = table.pop("subset", [{}])
    for number, subset in enumerate(subsets):
        yield _renamed(f"{path}: prompt.subset {number}", {**table, **subset})


def _read_json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        entries = json.loads(_text(path))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{path}: must be a list of objects, each with a prompt")
    for number, entry in enumerate(entries):
        yield _renamed(f"{path}: entry {number}", entry)


def _renamed(where: str, entry: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if unknown := sorted(entry.keys() - _KEYS):
        raise ConfigError(f"{where}: unknown key {', '.join(unknown)}; known are {', '.join(_KEYS)}")
    return where, {_KEYS[key]: value for key, value in entry.items() if value is not None}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"preview.file {path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
