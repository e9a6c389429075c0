"""What tags have to do with each other: by their words, and by tables followed to their end. Pure functions on names.

Tags are in underscore form. What a policy makes of the relations is `lexicon`'s.
"""

import re
from collections.abc import Mapping
from itertools import combinations

_NOT_A_KIND_OF = {
    "no", "not", "non", "without", "covered", "fake", "missing", "on", "in", "at", "of", "with", "under", "over",
    "behind", "between", "against", "by", "from", "to", "for", "into", "through", "as", "and", "or",
}  # fmt: skip
"""Words of a tag before which the rest is another thing: `no_bra` is no kind of `bra`, `sitting_on_bed` no `bed`."""
_PARENTHESES = re.compile(r"(.+?)((?:_\([^()]+\))+)")
_BETWEEN_WORDS = re.compile(r"[_/:]+")


def heads(tag: str) -> list[str]:
    """Return the tags that `tag` is a kind of by its words: its endings, unless a negation or preposition is cut off.

    `very_long_hair` gives long_hair, hair; `no_skirt`, `hair_ribbon` and `skirt` give nothing of skirt or hair.
    """
    words = tag.split("_")
    if not all(words):
        return []
    found = []
    for place in range(1, len(words)):
        if words[place - 1] in _NOT_A_KIND_OF or words[place].startswith("("):
            break
        found.append("_".join(words[place:]))
    return found


def base_characters(tag: str) -> list[str]:
    """Return the character tags that say less of the same one: `tag` with some of its parentheses left out.

    `miku_(append)_(vocaloid)` gives miku, miku_(append), miku_(vocaloid).
    """
    match = _PARENTHESES.fullmatch(tag)
    if match is None:
        return []
    parts = [f"_({part})" for part in match[2][2:-1].split(")_(")]
    return [match[1] + "".join(some) for number in range(len(parts)) for some in combinations(parts, number)]


def series_of_parenthesis(text: str) -> list[str]:
    """Return the series that the parenthesis of a character names: itself and its leading words, and `…_(series)`.

    `fate/grand_order` gives fate, fate_(series), fate/grand, …, fate/grand_order and fate/grand_order_(series).
    """
    ends = [*(match.start() for match in _BETWEEN_WORDS.finditer(text)), len(text)]
    return [name for end in ends if end for name in (text[:end], f"{text[:end]}_(series)")]


def final_names(alias: Mapping[str, str]) -> dict[str, str]:
    """Return other name → name, where the name is no other name itself. Raises ValueError for a circle."""
    found = {}
    for tag, name in alias.items():
        path = [tag]
        while alias.get(name, name) != name:
            if name in path:
                raise ValueError(f"{' → '.join([*path, name])} is a circle; name the tag that shall stand")
            path.append(name)
            name = alias[name]
        found[tag] = name
    return found


def by_final_names(table: Mapping[str, tuple[str, ...]], names: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Return tag → tags by their final names, none twice, none under itself. names: of `final_names`."""
    found: dict[str, dict[str, None]] = {}
    for tag, others in table.items():
        own = names.get(tag, tag)
        finals = (names.get(other, other) for other in others)
        found.setdefault(own, {}).update(dict.fromkeys(other for other in finals if other != own))
    return {tag: tuple(others) for tag, others in found.items()}


def all_implied(implied: Mapping[str, tuple[str, ...]], names: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Return tag → tags that it implies, directly or through others, the nearest first, by their final names.

    Raises ValueError when a tag implies itself through others: each would remove the other.
    """
    direct = by_final_names(implied, names)
    found = {}
    for tag in direct:
        reached: dict[str, None] = {}
        queue = [tag]
        for step in queue:
            for other in direct.get(step, ()):
                if other == tag:
                    raise ValueError(f"{tag!r} implies itself through {step!r}; take one of the two away")
                if other not in reached:
                    reached[other] = None
                    queue.append(other)
        found[tag] = tuple(reached)
    return found
