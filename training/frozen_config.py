"""run.toml: the resolved config of a run, frozen at its first launch.

Writes the small part of TOML that configs need, and compares later launches with it key by key.
Which keys a recipe declares free, and which may grow, is decided elsewhere.
"""

import json
import math
import re
import tomllib
from collections.abc import Container, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from sharding.files import write_bytes

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_LINE_LENGTH = 120
_NOT_SET = "(not set)"


class ConfigChangedError(ValueError):
    """A launch's config differs from the one its run was started with."""


class Change(NamedTuple):
    """A key's frozen and present value; None: not set."""

    was: Any
    now: Any
    has_grown: bool = False
    """It is a growing key and now holds more than before."""


def freeze_config(
    path: Path, resolved: Mapping[str, Any], *, free: Container[str], growing: Container[str] = ()
) -> dict[str, Change]:
    """Write `resolved` to `path` at the first launch; later compare with what is there.

    free: dotted keys that may differ (`previews.every_steps`), or tables (`previews`) all of whose keys may.
    growing: dotted keys that may get larger: a higher number, or a list that still holds all that it held.
    Returns these differences by dotted key, for printing. The file keeps the first launch's values until
    `write_grown` is called. Raises ConfigChangedError that lists every other difference. None is the same as absent.
    """
    if not path.exists():
        write_bytes(path, to_toml(resolved).encode())
        return {}
    try:
        frozen = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigChangedError(f"{path}: not readable ({error}); restore the file") from error
    changes = changes_between(frozen, resolved, growing=growing)
    refused = {key: change for key, change in changes.items() if not change.has_grown and not _is_free(key, free)}
    if refused:
        listing = "\n".join(
            f"  {key}: was {_show(change.was)}, now {_show(change.now)}{' (it may only grow)' * (key in growing)}"
            for key, change in refused.items()
        )
        raise ConfigChangedError(
            f"{path}: the run was started with another config:\n{listing}\n"
            "put the old values back, or start a new run folder (with the weights of this one as its init)"
        )
    return changes


def changes_between(
    before: Mapping[str, Any], after: Mapping[str, Any], *, growing: Container[str] = ()
) -> dict[str, Change]:
    """Return what differs between two configs, by dotted key. growing: see `freeze_config`."""
    was, now = _flatten(_plain(before, "config")), _flatten(_plain(after, "config"))
    return {
        key: Change(was.get(key), now.get(key), key in growing and _has_grown(was.get(key), now.get(key)))
        for key in [*was, *(key for key in now if key not in was)]
        if not _is_same(was.get(key), now.get(key))
    }


def write_grown(path: Path, changes: Mapping[str, Change]) -> None:
    """Put the new values of keys that have grown into the file, so that later launches start from them."""
    frozen = tomllib.loads(path.read_text(encoding="utf-8"))
    for key, change in changes.items():
        *tables, name = key.split(".")
        table = frozen
        for part in tables:
            table = table[part]
        table[name] = change.now
    write_bytes(path, to_toml(frozen).encode())


def to_toml(config: Mapping[str, Any]) -> str:
    """Return a config as TOML text: a table's own values first, then its tables. None values are left out.

    str, bool, int, float, paths (as strings), lists and tuples of these and of tables, nested tables.
    Raises TypeError, naming the key, for anything else.
    """
    lines: list[str] = []
    _emit_table(_plain(config, "config"), (), lines)
    return "\n".join(lines).lstrip("\n") + "\n"


def _emit_table(table: Mapping[str, Any], name: tuple[str, ...], lines: list[str]) -> None:
    values = {key: value for key, value in table.items() if not isinstance(value, Mapping)}
    if name and (values or not table):
        lines += ["", f"[{'.'.join(_key(part) for part in name)}]"]
    for key, value in values.items():
        line = f"{_key(key)} = {_value(value)}"
        if isinstance(value, list) and len(line) > _LINE_LENGTH:
            line = f"{_key(key)} = [\n" + "".join(f"    {_value(item)},\n" for item in value) + "]"
        lines.append(line)
    for key, value in table.items():
        if isinstance(value, Mapping):
            _emit_table(value, (*name, key), lines)


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _string(key)


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, list):
        return f"[{', '.join(_value(item) for item in value)}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_key(key)} = {_value(item)}' for key, item in value.items())}}}"
    return repr(value)  # int; float: shortest form that reads back the same, inf and nan included


def _plain(value: Any, where: str) -> Any:
    """Return the value as TOML would give it back; None only inside tables, where it is left out."""
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"{where}: key {wrong[0]!r} is not a string")
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items() if item is not None}
    if isinstance(value, PurePath):
        return str(value)
    for kind in (bool, str, int, float):
        if isinstance(value, kind):
            return kind(value)  # an enum of strings becomes its string
    if isinstance(value, Sequence):
        return [_plain(item, f"{where}[{number}]") for number, item in enumerate(value)]
    raise TypeError(f"{where}: {type(value).__name__} cannot be written as TOML: {value!r}")


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {dotted key: value}; lists are values. An empty table is no key."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _is_same(was: Any, now: Any) -> bool:
    if isinstance(was, float) and isinstance(now, float) and math.isnan(was) and math.isnan(now):
        return True
    return bool(was == now) and isinstance(was, bool) == isinstance(now, bool)


def _has_grown(was: Any, now: Any) -> bool:
    if isinstance(was, list) and isinstance(now, list):
        return len(now) > len(was) and all(value in now for value in was)
    return isinstance(was, int | float) and isinstance(now, int | float) and now > was


def _is_free(key: str, free: Container[str]) -> bool:
    parts = key.split(".")
    return any(".".join(parts[:length]) in free for length in range(1, len(parts) + 1))


def _show(value: Any) -> str:
    return _NOT_SET if value is None else _value(value)
