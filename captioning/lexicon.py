"""What a policy says about a tag: its word and group, what it removes and adds. Found once per tag and process.

A tag has a number for each category it comes in. Nothing about pictures is known here; `tag_stream` applies it to them.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from captioning.policy import TAG_TEMPLATE_FIELD, PolicyConfig
from captioning.spelling import clean_word, expand_character, given_name_last, spell_tag
from captioning.tag_relations import (
    all_implied,
    base_characters,
    by_final_names,
    final_names,
    heads,
    series_of_parenthesis,
)
from captioning.tag_rules import BlacklistConfig
from captioning.words import NO_WORD, Column, Ids, Words

NO_TAG = -1
COUNT_TAGS = (
    "1girl", "2girls", "3girls", "4girls", "5girls", "6+girls", "multiple_girls", "1boy", "2boys", "3boys", "4boys",
    "5boys", "6+boys", "multiple_boys", "male_focus", "1other", "2others", "3others", "4others", "5others", "6+others",
    "multiple_others",
)  # fmt: skip
"""The group count, in this order."""
STYLE_TAG = re.compile(r"(\d{4})s_\(style\)")
_MEDIUM_ENDING, _NO_MEDIUM = "_(medium)", "photoshop_(medium)"
_GROUP_OF_CATEGORY = {
    "general": "rest", "character": "character", "copyright": "series", "artist": "artist", "meta": "meta",
}  # fmt: skip


@dataclass(frozen=True)
class LexiconArrays:
    """The lexicon as arrays by tag number; -1 where there is none."""

    words: Ids
    groups: Ids
    series_words: Ids
    """Word of the series in a character's parentheses."""
    barred: Ids
    """Bit n is set where pictures of the n-th source of tags.source_blacklist never get the tag."""
    barred_series: Ids
    """The same for the series in a character's parentheses."""
    is_character: Ids
    may_be_tagged: Ids
    """1 where a tagger may add the tag."""
    style_years: Ids
    removed_from: Ids
    """(T + 1,): tag n removes removed[removed_from[n]:removed_from[n + 1]]."""
    removed: Ids
    added_from: Ids
    added: Ids


class Lexicon:
    """Numbers for (tag, category), and what the policy makes of each."""

    def __init__(self, rules: PolicyConfig, words: Words) -> None:
        self._rules, self._words = rules, words
        self._numbers: dict[tuple[str, str], int] = {}
        self._keep = frozenset(rules.tags.keep_underscores)
        self._dropped = frozenset(rules.tags.drop_tags)
        self._given_first = frozenset(rules.tags.given_name_first)
        self._kept_redundant = frozenset(rules.tags.keep_redundant)
        self._alias = final_names(rules.tags.alias)
        self._implied = all_implied(rules.tags.implied, self._alias)
        self._traits = by_final_names(rules.traits, self._alias)
        self._is_listed = {category: _matcher(table) for category, table in rules.tags.blacklist.items()}
        self._is_listed_of_source = [_matcher(table) for table in rules.tags.source_blacklist.values()]
        self._group_of = group_matcher(rules.tag_groups)
        self._columns = {name: Column() for name in LexiconArrays.__dataclass_fields__}
        for name in ("removed_from", "added_from"):
            self._columns[name].append(0)
        self._queue: list[tuple[str, str]] = []

    def numbers(self, tags: Sequence[str], category: str) -> list[int]:
        """Return the number of each tag; NO_TAG for one that the policy drops."""
        found = [self._number(tag, category) for tag in tags]
        # Tags that are named by others get numbers, too, and may name further ones.
        while self._queue:
            queue, self._queue = self._queue, []
            for tag, tag_category in queue:
                self._relate(tag, tag_category)
        return found

    def _number(self, tag: str, category: str) -> int:
        number = self._numbers.get((tag, category))
        if number is None:
            name = self._alias.get(tag, tag)
            number = self._numbers.get((name, category)) if name != tag else None
            if number is None:
                number = self._new_number(name, category)
            self._numbers[tag, category] = self._numbers[name, category] = number
        return number

    def _new_number(self, tag: str, category: str) -> int:
        if not tag or category not in _GROUP_OF_CATEGORY or tag in self._dropped:
            return NO_TAG
        if category in self._is_listed and self._is_listed[category](tag):
            return NO_TAG
        self._append(tag, category)
        return len(self._columns["words"]) - 1

    def names(self) -> list[tuple[str, str]]:
        """Return (tag, category) of each number."""
        names = [("", "")] * len(self._columns["words"])
        for pair, number in self._numbers.items():
            if number != NO_TAG and self._alias.get(pair[0], pair[0]) == pair[0]:
                names[number] = pair
        return names

    def arrays(self) -> LexiconArrays:
        """Return what is known so far."""
        return LexiconArrays(**{name: column.array() for name, column in self._columns.items()})

    def _append(self, tag: str, category: str) -> None:
        name, series = tag, ""
        if category == "character" and self._rules.tags.character_tag_expand:
            name, series = expand_character(tag)
            is_listed = "copyright" in self._is_listed and self._is_listed["copyright"](series)
            series = "" if series in self._dropped or is_listed else series
        group = self._group(tag, category)
        # kohya looks at the length of "name, series", which is never up to three characters.
        keeps_short = not (series and self._rules.tags.kohya_characters)
        style = STYLE_TAG.fullmatch(tag) if category == "general" else None
        values = {
            "words": self._word(name, group, keeps_short=keeps_short),
            "groups": self._place(group),
            "series_words": self._word(series, "series", keeps_short=keeps_short) if series else NO_WORD,
            "barred": self._bits(tag),
            "barred_series": self._bits(series),
            "is_character": int(category == "character"),
            "may_be_tagged": int(group not in self._rules.tags.record_only),
            "style_years": int(style[1]) if style is not None else -1,
        }
        for column, value in values.items():
            self._columns[column].append(value)
        self._queue.append((tag, category))

    def _bits(self, tag: str) -> int:
        return sum(1 << place for place, is_listed in enumerate(self._is_listed_of_source) if is_listed(tag))

    def _word(self, tag: str, group: str, *, keeps_short: bool) -> int:
        rules = self._rules
        if group == "character" and self._given_first and tag.split("_(")[0] in self._given_first:
            tag = given_name_last(tag)
        if keeps_short or not rules.tags.remove_underscores:
            text = spell_tag(tag, remove_underscores=rules.tags.remove_underscores, keep_underscores=self._keep)
        else:
            text = clean_word(tag.replace("_", " "))
        template = rules.templates.get(group, TAG_TEMPLATE_FIELD)
        return self._words.number(template.replace(TAG_TEMPLATE_FIELD, text) if text else "")

    def _group(self, tag: str, category: str) -> str:
        if category == "meta" and tag.endswith(_MEDIUM_ENDING) and tag != _NO_MEDIUM and "medium" in self._rules.groups:
            return "medium"
        if category == "general":
            if "count" in self._rules.groups and tag in COUNT_TAGS:
                return "count"
            if "style" in self._rules.groups and STYLE_TAG.fullmatch(tag):
                return "style"
            return self._group_of(tag) or "rest"
        return _GROUP_OF_CATEGORY[category]

    def _place(self, group: str) -> int:
        groups = self._rules.groups
        group = group if group in groups else "rest"
        return groups.index(group) if group in groups else -1

    def _relate(self, tag: str, category: str) -> None:
        """Write down what a tag removes and adds. Called once per tag, in the order of their numbers."""
        tags = self._rules.tags
        removed = [(trait, "general") for trait in self._traits.get(tag, ()) if category == "character"]
        implied = [(other, category) for other in self._implied.get(tag, ())]
        if tags.implied_rule == "drop":
            removed += implied
        if tags.drop_redundant and category == "general":
            removed += [(other, category) for other in heads(tag) if other not in self._kept_redundant]
        if tags.drop_base_characters and category == "character":
            removed += [(other, category) for other in base_characters(tag)]
        if tags.drop_series_of_characters and category == "character":
            removed += [(series, "copyright") for series in series_of_parenthesis(expand_character(tag)[1])]
        self._write("removed", removed)
        self._write("added", implied if tags.implied_rule == "add" else [])

    def _write(self, relation: str, others: list[tuple[str, str]]) -> None:
        for other, category in others:
            number = self._number(other, category)
            if number != NO_TAG:
                self._columns[relation].append(number)
        self._columns[f"{relation}_from"].append(len(self._columns[relation]))


def group_matcher(groups: dict[str, tuple[str, ...]]) -> Callable[[str], str]:
    """Return a function tag → group, "" for none. Exact names go before patterns (`*`), the first group wins."""
    exact: dict[str, str] = {}
    patterns = []
    for group, names in groups.items():
        for name in names:
            if "*" in name and name != "*":
                patterns.append((re.compile(".*".join(map(re.escape, name.split("*")))), group))
            else:
                exact.setdefault(name, group)

    def group_of(tag: str) -> str:
        return exact.get(tag) or next((group for pattern, group in patterns if pattern.fullmatch(tag)), "")

    return group_of


def _matcher(table: BlacklistConfig) -> Callable[[str], bool]:
    tags = frozenset(table.tags)
    patterns = [re.compile(pattern) for pattern in table.patterns]

    def is_listed(tag: str) -> bool:
        return (
            tag in tags
            or any(part in tag for part in table.substrings)
            or any(pattern.fullmatch(tag) for pattern in patterns)
        )

    return is_listed
