"""Read JSON that people wrote by hand: without braces or commas, with lone backslashes, comments, Python's words.

What is not strict JSON is repaired and told, line by line; nothing is skipped. Text that cannot be understood is an
error with its line. For strict text the values are those of `json.loads`.
"""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

_SPACE = re.compile(r"(?:\s|//[^\n]*|#[^\n]*|/\*.*?\*/)*", re.DOTALL)
_WORD = re.compile(r"[+-]?[\w.][\w.+-]*")
_QUOTES = {'"': '"', "'": "'", "“": "”", "”": "”", "„": "“", "‘": "’"}
_WORDS = {"true": True, "false": False, "null": None, "none": None, "nan": None}
_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", '"': '"', "\\": "\\", "/": "/"}
_CONTROL = {"\b": r"\b", "\f": r"\f", "\n": r"\n", "\r": r"\r", "\t": r"\t"}


class LenientJsonError(ValueError):
    """The text makes no sense even to a lenient reader; the message has the line."""


@dataclass(frozen=True)
class Repair:
    """One thing that was not JSON, and how it was read. line: from 1."""

    line: int
    what: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.what}"


def read_values(text: str, *, is_path: Callable[[str], bool] = lambda key: False) -> tuple[list[Any], list[Repair]]:
    """Return the values at the top of the text, and what had to be repaired.

    Pairs that stand outside of braces are gathered into objects; a new one begins where a key comes again.
    is_path: tells of a key whether its value is a path, in which `\\n` and the like were meant as backslash and letter.
    Raises LenientJsonError.
    """
    reader = _Reader(text, is_path)
    values = reader.top()
    return values, list(dict.fromkeys(reader.repairs))


class _Reader:
    def __init__(self, text: str, is_path: Callable[[str], bool]) -> None:
        self._text, self._is_path = text, is_path
        self._at = 0
        self.repairs: list[Repair] = []

    def top(self) -> list[Any]:
        values: list[Any] = []
        loose: list[dict[str, Any]] = []
        while mark := self._peek():
            if mark in ",]}":
                if mark != ",":
                    self._tell(f"a {mark!r} that closes nothing is passed over")
                self._at += 1
                continue
            start = self._at
            value = self._value("")
            if self._peek() == ":":
                self._at = start
                known = len(loose)
                self._pair(loose, "an object without braces begins here")
                values += loose[known:]
            else:
                values.append(value)
                loose = []
                self._comma("", start)
        return values

    def _value(self, key: str) -> Any:
        mark = self._peek()
        if mark == "{":
            return self._object()
        if mark == "[":
            return self._list(key)
        if mark in _QUOTES:
            return self._string(key)
        return self._word()

    def _object(self) -> dict[str, Any] | list[dict[str, Any]]:
        """Read up to the closing brace. A key that comes again means that braces between two objects were lost."""
        objects: list[dict[str, Any]] = [{}]
        opened = self._at
        self._at += 1
        while (mark := self._peek()) != "}":
            if not mark:
                self._tell("a '{' that is never closed ends with the text", opened)
                break
            self._pair(objects, "")
        self._at += 1
        return objects[0] if len(objects) == 1 else objects

    def _pair(self, objects: list[dict[str, Any]], opening: str) -> None:
        """Read `key: value` into the last object, or into a new one where the key comes again."""
        start = self._at
        key = self._value("")
        if not isinstance(key, str):
            raise self._error(f"a key must be text, got {key!r}", start)
        if self._peek() != ":":
            raise self._error(f"after the key {key!r} a ':' is missing")
        if not objects or key in objects[-1]:
            self._tell(opening or f"{key!r} comes again: another object begins here", start)
            objects.append({})
        self._at += 1
        objects[-1][key] = self._value(key)
        self._comma("}", start)

    def _list(self, key: str) -> list[Any]:
        found: list[Any] = []
        opened = self._at
        self._at += 1
        while (mark := self._peek()) != "]":
            if not mark:
                self._tell("a '[' that is never closed ends with the text", opened)
                return found
            start = self._at
            value = self._value(key)
            if self._peek() == ":":  # pairs in a list: braces were lost
                self._at = start
                return [*found, *self._pairs_in_list()]
            found.append(value)
            self._comma("]", start)
        self._at += 1
        return found

    def _pairs_in_list(self) -> list[Any]:
        """Read pairs without braces up to the list's end."""
        objects: list[dict[str, Any]] = []
        while (mark := self._peek()) not in ("]", ""):
            if mark in ",{}":
                self._at += 1
                continue
            self._pair(objects, "an object without braces begins here")
        self._at += 1
        return objects

    def _comma(self, end: str, start: int) -> None:
        """Step over a comma. Tell when it is missing between two things, or stands before the end."""
        mark = self._peek()
        if mark == ",":
            comma = self._at
            self._at += 1
            if self._peek() == end:
                self._tell("a comma before the end is passed over", comma)
        elif mark and mark not in "]}":
            self._tell("a comma is missing after this", start)

    def _word(self) -> Any:
        found = _WORD.match(self._text, self._at)
        if found is None:
            raise self._error(f"{self._text[self._at :][:20]!r} is not expected here")
        word, start = found.group(), self._at
        self._at = found.end()
        with suppress(ValueError):
            return json.loads(word)
        if word.lower() in _WORDS:
            self._tell(f"{word} is read as {json.dumps(_WORDS[word.lower()])}", start)
            return _WORDS[word.lower()]
        if self._peek() == ":":
            self._tell(f"the key {word} has no quotes", start)
            return word
        raise self._error(f"{word!r} is neither a number nor text in quotes", start)

    def _string(self, key: str) -> str:
        start, quote = self._at, self._text[self._at]
        end = self._string_end(start, _QUOTES[quote])
        raw = self._text[start + 1 : end]
        self._at = end + 1
        if quote != '"':
            self._tell(f"the quotes {quote}…{_QUOTES[quote]} are read as straight ones", start)
        return self._unescaped(raw, key, start)

    def _string_end(self, start: int, quote: str) -> int:
        """Return where the string ends; a backslash before the last quote of a line was meant as a backslash."""
        at = start + 1
        line_end = self._text.find("\n", at)
        line_end = len(self._text) if line_end < 0 else line_end
        while at < line_end:
            if self._text[at] == "\\":
                at += 2
            elif self._text[at] == quote:
                return at
            else:
                at += 1
        swallowed = self._text.find("\\" + quote, start + 1, line_end)
        if swallowed >= 0:
            return swallowed + 1
        raise self._error("text in quotes does not end on its line", start)

    def _unescaped(self, raw: str, key: str, start: int) -> str:
        found, at, repaired = [], 0, set()
        is_path = self._is_path(key)
        while at < len(raw):
            if raw[at] != "\\":
                if raw[at] in _CONTROL:
                    repaired.add(f"a bare {_CONTROL[raw[at]]} inside text is kept")
                found.append(raw[at])
                at += 1
                continue
            letter = raw[at + 1 : at + 2]
            if letter == "u" and re.fullmatch(r"[0-9a-fA-F]{4}", raw[at + 2 : at + 6]) and not is_path:
                found.append(self._unicode(raw, at))
                at += 12 if ord(found[-1][0]) > 0xFFFF else 6
                continue
            meant = _ESCAPES.get(letter)
            if meant is None or (is_path and meant in _CONTROL):
                repaired.add(f"a lone backslash before {letter or 'the end'!r} is kept as a backslash")
                found.append("\\")
                at += 1
                continue
            found.append(meant)
            at += 2
        for what in sorted(repaired):
            self._tell(f"{key}: {what}" if key else what, start)
        return "".join(found)

    @staticmethod
    def _unicode(raw: str, at: int) -> str:
        """Return the character of one \\uXXXX, or of a surrogate pair."""
        for length in (12, 6):
            with suppress(ValueError):
                text: str = json.loads(f'"{raw[at : at + length]}"')
                if len(text) == 1:
                    return text
        return raw[at : at + 6]

    def _peek(self) -> str:
        """Step over space and comments; return the next character, "" at the end."""
        found = _SPACE.match(self._text, self._at)
        assert found is not None
        if any(mark in found.group() for mark in ("//", "#", "/*")):
            self._tell("a comment is passed over")
        self._at = found.end()
        return self._text[self._at : self._at + 1]

    def _tell(self, what: str, at: int | None = None) -> None:
        self.repairs.append(Repair(self._line(self._at if at is None else at), what))

    def _error(self, what: str, at: int | None = None) -> LenientJsonError:
        return LenientJsonError(f"line {self._line(self._at if at is None else at)}: {what}")

    def _line(self, at: int) -> int:
        return self._text.count("\n", 0, at) + 1
