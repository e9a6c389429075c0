"""What an edit does to one caption. Pure functions on (group, word) pairs; every word keeps or gets a group.

Words are compared with underscores as spaces. Nothing here knows tables or files.
"""

import re
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from typing import Literal

from captioning.edit_filter import Words, compile_regex, plain
from captioning.edit_table import SEPARATOR, EditError
from captioning.spelling import clean_word

Operation = Callable[[Words], Words]
Place = Literal["head", "tail"]
Order = Literal["alphabet", "length"]


def split_words(text: str) -> list[str]:
    """Return the words of a text separated by commas, none twice and none empty."""
    return [word for word in dict.fromkeys(clean_word(piece) for piece in text.split(",")) if word]


def replace_tags(old: str, new: str, *, is_regex: bool = False, group: str = "") -> Operation:
    """Replace whole words equal to `old`, or what a regular expression finds within a word.

    An empty result drops the word, one with commas becomes several words. group: only there; empty: everywhere.
    """
    rewrite = _rewriter(old, new, is_regex=is_regex)

    def apply(words: Words) -> Words:
        done: list[tuple[str, str]] = []
        for name, word in words:
            if group not in ("", name):
                done.append((name, word))
                continue
            after = rewrite(word)
            done += [(name, word)] if after == word else [(name, it) for it in split_words(after)]
        return _unique(done)

    return apply


def _rewriter(old: str, new: str, *, is_regex: bool) -> Callable[[str], str]:
    if not plain(old):
        raise EditError("replace: the words to look for are empty")
    if is_regex:
        pattern = compile_regex(old)
        _check_template(pattern, new)
        return lambda word: pattern.sub(new, word)
    wanted = plain(old)
    return lambda word: new if plain(word) == wanted else word


def _check_template(pattern: re.Pattern[str], new: str) -> None:
    """Raise EditError when the replacement names a group that the pattern has not."""
    try:
        re.compile(f"(?:{pattern.pattern})|", pattern.flags).sub(new, "")
    except (re.error, IndexError) as error:
        raise EditError(f"replacement {new!r}: {error}") from None


def replace_in_caption(old: str, new: str, *, is_regex: bool = False) -> Operation:
    """Replace text anywhere in the whole caption; unchanged words keep their groups, see `regroup`."""
    if not old:
        raise EditError("replace: the text to look for is empty")
    if is_regex:
        pattern = compile_regex(old)
        _check_template(pattern, new)
        return lambda words: regroup(words, pattern.sub(new, caption_text(words)))
    return lambda words: regroup(words, caption_text(words).replace(old, new))


def set_caption(text: str) -> Operation:
    """Put a new text in place of the whole caption."""
    return lambda words: regroup(words, text)


def caption_text(words: Words) -> str:
    """Return the caption."""
    return SEPARATOR.join(word for _, word in words)


def regroup(words: Words, text: str, *, default: str = "rest") -> Words:
    """Return the words of `text`, each in the group of the word that it takes the place of.

    A word that takes no other's place goes to the group of the word before it, at the head to that of the first word.
    """
    before, after = [word for _, word in words], split_words(text)
    done: list[tuple[str, str]] = []
    for kind, start, end, new_start, new_end in SequenceMatcher(a=before, b=after, autojunk=False).get_opcodes():
        for place in range(new_start, new_end):
            if kind in ("equal", "replace"):
                group = words[min(start + place - new_start, end - 1)][0]
            else:
                group = words[max(start - 1, 0)][0] if words else default
            done.append((group, after[place]))
    return tuple(done)


def add_tags(tags: Sequence[str], *, group: str, place: Place = "tail") -> Operation:
    """Put words at the head or tail of a group, but not those that the caption has already."""
    wanted = [word for tag in tags for word in split_words(tag)]
    if not wanted:
        raise EditError("add: no words are given")

    def apply(words: Words) -> Words:
        there = {plain(word) for _, word in words}
        added = tuple((group, word) for word in wanted if plain(word) not in there)
        return added + words if place == "head" else words + added

    return apply


def remove_tags(tags: Sequence[str], *, is_regex: bool = False, group: str = "") -> Operation:
    """Remove whole words, or words in which a regular expression finds something."""
    if not tags or not all(map(plain, tags)):
        raise EditError("remove: a word to look for is empty")
    patterns = [compile_regex(tag) for tag in tags] if is_regex else []
    wanted = {plain(tag) for tag in tags}

    def is_unwanted(word: str) -> bool:
        return any(pattern.search(word) for pattern in patterns) if is_regex else plain(word) in wanted

    return lambda words: tuple((name, word) for name, word in words if group not in ("", name) or not is_unwanted(word))


def sort_tags(*, group: str, by: Order = "alphabet") -> Operation:
    """Sort the words of one group; by length the shortest stands first."""

    def rank(pair: tuple[str, str]) -> tuple[int, str]:
        return (len(pair[1]) if by == "length" else 0, pair[1].casefold())

    def apply(words: Words) -> Words:
        ordered = iter(sorted((pair for pair in words if pair[0] == group), key=rank))
        return tuple(next(ordered) if pair[0] == group else pair for pair in words)

    return apply


def drop_doubles(words: Words) -> Words:
    """Drop words that equal an earlier one but for case, spaces and underscores."""
    seen: set[str] = set()
    done = []
    for pair in words:
        spelled = " ".join(plain(pair[1]).casefold().split())
        if spelled not in seen:
            seen.add(spelled)
            done.append(pair)
    return tuple(done)


def truncate(num_words: int) -> Operation:
    """Keep the first words of the whole caption."""
    if num_words < 0:
        raise EditError(f"truncate {num_words}: the number of words must be 0 or more")
    return lambda words: words[:num_words]


def _unique(words: Sequence[tuple[str, str]]) -> Words:
    seen: set[str] = set()
    return tuple(pair for pair in words if not (pair[1] in seen or seen.add(pair[1])))  # type: ignore[func-returns-value]
