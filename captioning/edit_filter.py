"""Which captions an edit is about: `tag = "long hair" and not (source = pixiv or score.aesthetic < 0.5)`.

    tag, or the name of a group of words   = word, != word, ~ regular expression; underscores count as spaces
    caption, key, source, dataset          the same, on the whole text
    score.NAME                             < <= > >= = a number; false where there is no score

with and, or, not and parentheses. Values with spaces stand in quotes. Reads no table.
"""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from captioning.edit_table import EditError

Words = tuple[tuple[str, str], ...]
"""(group, word) in the order of the caption."""

TEXT_FIELDS = ("caption", "key", "source", "dataset")
_NUMBERS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "=": operator.eq,
}  # fmt: skip
_TOKEN = re.compile(r"""\s*(?:"([^"]*)"|'([^']*)'|(<=|>=|!=|[=~<>()])|([^\s()=~<>!"']+))""")


@dataclass(frozen=True)
class CaptionRow:
    """One caption, with what a filter may ask."""

    key: str
    words: Words
    text: str
    source: str = ""
    dataset: str = ""
    scores: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class EditFilter:
    """A filter and the names of the scorers that it asks."""

    text: str
    matches: Callable[[CaptionRow], bool]
    scorers: frozenset[str]


def plain(word: str) -> str:
    """Return a word as words are compared: underscores are spaces."""
    return word.replace("_", " ").strip()


def compile_regex(pattern: str) -> re.Pattern[str]:
    """Return the compiled pattern. Raises EditError with the place of the mistake."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise EditError(f"regular expression {pattern!r}: {error}") from None


def parse_filter(text: str, *, groups: Sequence[str], scorers: Sequence[str]) -> EditFilter:
    """Read a filter; an empty one matches everything. Raises EditError for what it does not know."""
    if not text.strip():
        return EditFilter(text, lambda row: True, frozenset())
    return _Parser(text, groups, scorers).parse()


class _Parser:
    def __init__(self, text: str, groups: Sequence[str], scorers: Sequence[str]) -> None:
        self._text = text
        self._groups, self._scorers = tuple(groups), tuple(scorers)
        self._tokens = self._split(text)
        self._place = 0
        self._used: set[str] = set()

    def parse(self) -> EditFilter:
        matches = self._either()
        if self._place < len(self._tokens):
            raise self._error(f"unexpected {self._tokens[self._place][1]!r}; `and` or `or` may be missing")
        return EditFilter(self._text, matches, frozenset(self._used))

    def _split(self, text: str) -> list[tuple[str, str]]:
        """Return (kind, text) of each token; kind is value, sign or word."""
        tokens, place = [], 0
        while text[place:].strip():
            found = _TOKEN.match(text, place)
            if found is None:
                raise self._error(f"cannot read {text[place:].strip()!r}; is a quote missing?")
            double, single, sign, word = found.groups()
            if sign is not None:
                tokens.append(("sign", sign))
            elif word is not None:
                tokens.append(("word", word))
            else:
                tokens.append(("value", double if double is not None else single))
            place = found.end()
        return tokens

    def _error(self, what: str) -> EditError:
        return EditError(f"--where {self._text!r}: {what}")

    def _take_word(self, word: str) -> bool:
        """Step over a keyword if it stands here."""
        if self._place < len(self._tokens):
            kind, text = self._tokens[self._place]
            if kind == "word" and text.lower() == word:
                self._place += 1
                return True
        return False

    def _next(self, wanted: str) -> tuple[str, str]:
        if self._place >= len(self._tokens):
            raise self._error(f"ends where {wanted} is needed")
        self._place += 1
        return self._tokens[self._place - 1]

    def _either(self) -> Callable[[CaptionRow], bool]:
        terms = [self._both()]
        while self._take_word("or"):
            terms.append(self._both())
        return terms[0] if len(terms) == 1 else lambda row: any(term(row) for term in terms)

    def _both(self) -> Callable[[CaptionRow], bool]:
        terms = [self._one()]
        while self._take_word("and"):
            terms.append(self._one())
        return terms[0] if len(terms) == 1 else lambda row: all(term(row) for term in terms)

    def _one(self) -> Callable[[CaptionRow], bool]:
        if self._take_word("not"):
            term = self._one()
            return lambda row: not term(row)
        kind, name = self._next("a field")
        if (kind, name) == ("sign", "("):
            inner = self._either()
            if self._next("')'") != ("sign", ")"):
                raise self._error("')' is missing")
            return inner
        if kind != "word":
            raise self._error(f"{name!r} stands where the name of a field is needed")
        sign_kind, sign = self._next(f"=, ~ or another comparison after {name}")
        value_kind, value = self._next(f"a value after {name} {sign}")
        if sign_kind != "sign" or sign in "()" or value_kind == "sign":
            raise self._error(f"a comparison such as {name} = VALUE is needed, got {name} {sign} {value}")
        return self._comparison(name, sign, value)

    def _comparison(self, name: str, sign: str, value: str) -> Callable[[CaptionRow], bool]:
        if name.startswith("score."):
            return self._score(name.removeprefix("score."), sign, value)
        if name not in ("tag", *TEXT_FIELDS, *self._groups):
            known = ", ".join(
                dict.fromkeys(["tag", *TEXT_FIELDS, *self._groups, *(f"score.{it}" for it in self._scorers)])
            )
            raise self._error(f"unknown field {name!r}; known: {known}")
        if sign not in ("=", "!=", "~"):
            raise self._error(f"{name} {sign}: only =, != and ~ compare texts")
        values = _texts_of(name)
        if sign == "~":
            try:
                pattern = compile_regex(value)
            except EditError as error:
                raise self._error(str(error)) from None
            return lambda row: any(pattern.search(text) for text in values(row))
        wanted = value if name in TEXT_FIELDS else plain(value)
        if name not in TEXT_FIELDS:
            raw = values
            values = lambda row: [plain(word) for word in raw(row)]  # noqa: E731
        return lambda row: (wanted in values(row)) == (sign == "=")

    def _score(self, scorer: str, sign: str, value: str) -> Callable[[CaptionRow], bool]:
        if scorer not in self._scorers:
            raise self._error(f"unknown field 'score.{scorer}'; scorers: {', '.join(self._scorers) or 'none'}")
        if sign not in _NUMBERS:
            raise self._error(f"score.{scorer} {sign}: only {', '.join(_NUMBERS)} compare numbers")
        try:
            limit = float(np.float32(float(value)))  # the precision that scores are stored in
        except ValueError:
            raise self._error(f"score.{scorer} {sign} {value!r}: not a number") from None
        self._used.add(scorer)
        compare = _NUMBERS[sign]

        def is_so(row: CaptionRow) -> bool:
            score = row.scores.get(scorer)
            return score is not None and compare(score, limit)

        return is_so


def _texts_of(name: str) -> Callable[[CaptionRow], Sequence[str]]:
    if name == "tag":
        return lambda row: [word for _, word in row.words]
    if name in TEXT_FIELDS:
        attribute = "text" if name == "caption" else name
        return lambda row: [getattr(row, attribute)]
    return lambda row: [word for group, word in row.words if group == name]
