"""Count the words of the captions that stand for a tier, a period or a rating.

These are the tables of a model card: how many images are "very aesthetic", and how many have no such word at all.
Words that are free (characters, custom, the rest) are captioning's `stats`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sharding.config import DatasetConfig
from sharding.reporting.census import place_in
from sharding.reporting.questions import Questions, quoted, rows_of
from sharding.schema import CAPTIONS, PLAN, RATINGS, Workspace
from sharding.tables import list_parts

USUAL_TIERS = ("aesthetic", "quality")
"""Groups that are taken for tiers when the config does not have the policy."""
_RATING_WORDS = {
    "general": "general", "sensitive": "sensitive", "questionable": "nsfw", "explicit": "explicit nsfw",
}  # fmt: skip


@dataclass(frozen=True)
class WordCount:
    """How many captions have a word. threshold: the policy's number for it; None where there is none."""

    word: str
    threshold: float | None
    num_images: int


@dataclass(frozen=True)
class WordGroup:
    """The words of one group of the captions, in the policy's order."""

    name: str
    model: str
    """The scorer behind a tier, or ""."""
    comparison: str
    """`>` or `>=` for a tier, or ""."""
    words: tuple[WordCount, ...]
    num_without: int
    """Images whose caption has no word of the group."""


def count_words(questions: Questions, workspace: Workspace, config: DatasetConfig) -> tuple[WordGroup, ...]:
    """Count the words of tiers, date and rating in the captions of `pack.policy`, over planned images.

    An image without a caption counts as without a word. Before planning, all captions count.
    """
    parts = list_parts(workspace.captions(config.pack.policy))
    if not parts:
        return ()
    plan = list_parts(workspace.plan)
    where = f"where key in (select key from {rows_of(plan, PLAN)})" if plan else ""
    counted = rows_of(plan, PLAN) if plan else rows_of(parts, CAPTIONS)
    total = questions.ask_one(f"select count(*) as n from {counted}")["n"]
    policy = _table(config.policies, config.pack.policy)
    closed = [*(_table(policy, "tiers") if policy else USUAL_TIERS), "date", "rating"]
    wanted = ", ".join(quoted(name) for name in closed)
    rows = questions.ask(
        f"""
        select entry."group" as name, entry.tags as words, count(*) as n
        from (
            select unnest(list_filter(groups, lambda entry: entry."group" in ({wanted}))) as entry
            from {rows_of(parts, CAPTIONS)} {where})
        where len(entry.tags) > 0 group by all order by all
        """
    )
    with_words: dict[str, int] = {}
    words: dict[str, dict[str, int]] = {}
    for row in rows:
        with_words[row["name"]] = with_words.get(row["name"], 0) + row["n"]
        counts = words.setdefault(row["name"], {})
        for word in row["words"]:
            counts[word] = counts.get(word, 0) + row["n"]
    order = [name for name in policy.get("groups", ()) if name in closed]
    names = sorted({*words, *order}, key=lambda name: (place_in(order, name), name))
    return tuple(
        WordGroup(
            name=name,
            model=str(_table(_table(policy, "tiers"), name).get("model", "")),
            comparison=str(_table(_table(policy, "tiers"), name).get("comparison", "")),
            words=_in_order(words.get(name, {}), _known_words(name, policy, config)),
            num_without=total - with_words.get(name, 0),
        )
        for name in names
    )


def _in_order(counts: Mapping[str, int], known: Mapping[str, float | None]) -> tuple[WordCount, ...]:
    words = {**known, **{word: None for word in sorted(counts) if word not in known}}
    return tuple(WordCount(word, threshold, counts.get(word, 0)) for word, threshold in words.items() if word)


def _known_words(name: str, policy: Mapping[str, Any], config: DatasetConfig) -> dict[str, float | None]:
    """Return the words that a group may hold, in order, with their thresholds."""
    if name == "date":
        return dict.fromkeys(config.periods)
    if name == "rating":
        words = {**_RATING_WORDS, **_table(policy, "rating")}
        return {str(words[rating]): None for rating in RATINGS}
    tier = _table(_table(policy, "tiers"), name)
    return {word: threshold for threshold, word in tier.get("steps", ())} | {str(tier.get("rest", "")): None}


def _table(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a table of captioning's settings, which are not checked here; what is no table is empty."""
    value = values.get(name, {})
    return value if isinstance(value, Mapping) else {}
