"""How one tag is spelled in a caption. Pure functions on strings, remembered: the same tags come in every part."""

import re
from functools import lru_cache

_BREAKS = re.compile(r"[\s,]+")
_SHORT_TAG = 3


def clean_word(text: str) -> str:
    """Return `text` without commas and line breaks, which would split it into two words of a caption."""
    return _BREAKS.sub(" ", text).strip()


@lru_cache(maxsize=1 << 17)
def spell_tag(tag: str, *, remove_underscores: bool, keep_underscores: frozenset[str]) -> str:
    """Return the tag as it stands in a caption.

    A tag of up to three characters keeps its underscore (`^_^`, `o_o`), as do those of `keep_underscores`.
    """
    if remove_underscores and len(tag) > _SHORT_TAG and tag not in keep_underscores:
        tag = tag.replace("_", " ")
    return clean_word(tag)


@lru_cache(maxsize=1 << 17)
def expand_character(tag: str) -> tuple[str, str]:
    """Return (character, series) of `name_(series)`, in underscore form; series is "" when there is none.

    `name_(costume)_(series)` gives `name_(costume)`: only the last parenthesis is the series.
    """
    if not tag.endswith(")") or "(" not in tag:
        return tag, ""
    character, _, series = tag[:-1].rpartition("(")
    character = character.removesuffix("_")
    if not character or not series or ")" in series:
        return tag, ""
    return character, series


def given_name_last(character: str) -> str:
    """Return `asuka_souryuu_(eva)` as `souryuu_asuka_(eva)`: the last word of the name moves to the front."""
    name, bracket, rest = character.partition("_(")
    *given, family = name.split("_")
    return "_".join([family, *given]) + bracket + rest
