"""Words that a picture has one of, or that its source gives: tiers, period and year, style, rating, custom words.

Each function adds to a WordTable and returns for how many pictures there was no value. Tags are `tag_stream`'s.
"""

from collections.abc import Mapping
from string import Formatter

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captioning.config import CaptioningConfig
from captioning.part_input import PartInput
from captioning.policy import PolicyConfig
from captioning.spelling import clean_word
from captioning.tiers import NO_TIER, higher_tier, summed_tier_numbers, tier_numbers, voted_tier_numbers
from captioning.word_rules import DateWordsConfig, StyleWordsConfig, TierConfig
from captioning.word_table import WordTable
from captioning.words import NO_WORD, Ids, Words
from sharding.schema import RATINGS

_NO_STYLE = 10_000


def ratings(given: PartInput, rules: PolicyConfig) -> Ids:
    """Return (N,) positions in schema.RATINGS, -1 where there is none."""
    chosen = np.full(given.records.num_rows, -1, dtype=np.int64)
    tagger = given.annotations.get(rules.tags.tagger)
    for origin in rules.rating.prefer:
        if origin == "tagger" and tagger is not None:
            numbers = _tagger_ratings(tagger)
        elif origin == "record":
            found = pc.index_in(given.records.column("rating"), pa.array(RATINGS))
            numbers = np.asarray(pc.fill_null(found, -1), dtype=np.int64)
        else:
            continue
        chosen = np.where(chosen < 0, numbers, chosen)
    return chosen


def add_ratings(table: WordTable, words: Words, chosen: Ids, rules: PolicyConfig) -> int:
    """Add the words of ratings."""
    numbers = np.array([*(words.number(word) for word in rules.rating.words), NO_WORD])
    table.add_to_group(np.arange(len(chosen)), numbers[chosen], group="rating")
    return int((chosen < 0).sum())


def add_tiers(
    table: WordTable, words: Words, given: PartInput, rules: TierConfig, *, group: str, rating: Ids
) -> dict[str, int]:
    """Add the words of one table of thresholds; return the pictures without any score, and with some of several."""
    missing = {}
    numbers = np.full(given.records.num_rows, NO_TIER, dtype=np.int32)
    if rules.also:
        scores = np.stack([given.scores(model) for model in rules.models])
        rows = [[threshold for threshold, _ in rules.steps], *rules.also.values()]
        numbers = summed_tier_numbers(scores, np.array(rows, dtype=np.float32), comparison=rules.comparison)
        num_there = np.isfinite(scores).sum(axis=0)
        missing[f"{group} (some of its scores)"] = int(((num_there > 0) & (num_there < len(scores))).sum())
    elif rules.model:
        thresholds = [threshold for threshold, _ in rules.steps]
        numbers = tier_numbers(given.scores(rules.model), thresholds, comparison=rules.comparison)
    if rules.votes is not None:
        votes = _first_number(given.records.column("custom").combine_chunks(), rules.votes.fields)
        voted = voted_tier_numbers(votes, rating, rules.votes.thresholds, comparison=rules.comparison)
        numbers = higher_tier(numbers, voted)
    # The last entry is what NO_TIER, -1, picks.
    by_tier = np.array([*(words.number(word) for _, word in rules.steps), words.number(rules.rest), NO_WORD])
    table.add_to_group(np.arange(len(numbers)), by_tier[numbers], group=group)
    return missing | {group: int((numbers == NO_TIER).sum())}


def add_dates(
    table: WordTable, words: Words, config: CaptioningConfig, given: PartInput, years: Ids, *, rules: DateWordsConfig
) -> dict[str, int]:
    """Add periods and years."""
    wanted = np.ones(len(years), dtype=bool)
    if rules.sources:
        wanted = np.asarray(pc.is_in(given.records.column("source"), value_set=pa.array(rules.sources)))
    distinct, which = np.unique(years, return_inverse=True)
    missing: dict[str, int] = {}
    for group in ("date", "year"):
        if group in table.groups:
            texts = [config.period_of(year) if group == "date" else _year_word(year, rules) for year in distinct]
            numbers = np.array([words.number(text or "") for text in texts], dtype=np.int64)
            chosen = np.where(wanted, numbers[which] if len(years) else which, NO_WORD)
            table.add_to_group(np.arange(len(years)), chosen, group=group)
            missing[group] = int((wanted & (chosen < 0)).sum())
    return missing


def add_styles(
    table: WordTable,
    words: Words,
    given: PartInput,
    years: Ids,
    *,
    tagged: tuple[Ids, Ids],
    rules: StyleWordsConfig,
) -> None:
    """Add "1990s (style)" where a picture looks older than it is. tagged: rows and years of pictures' style tags."""
    rows, styles = tagged
    is_older = (styles // 10 < years[rows] // 10) & (years[rows] > 0)
    chosen = np.full(len(years), _NO_STYLE, dtype=np.int64)
    np.minimum.at(chosen, rows[is_older], styles[is_older])
    if rules.model:
        seen = given.years(rules.model)
        looks_older = (seen // 10 < years // 10) | ((years >= 2015) & (years < 2020) & (seen < 2015))
        chosen = np.where((chosen == _NO_STYLE) & (years > 0) & (seen > 0) & looks_older, seen, chosen)
    distinct, which = np.unique(chosen, return_inverse=True)
    numbers = [words.number(f"{style}s (style)") if style != _NO_STYLE else NO_WORD for style in distinct.tolist()]
    table.add_to_group(np.arange(len(years)), np.array(numbers, dtype=np.int64)[which], group="style")


def add_custom(
    table: WordTable,
    words: Words,
    config: CaptioningConfig,
    records: pa.Table,
    years: Ids,
    *,
    templates: Mapping[str, str],
) -> int:
    """Add each source's own words."""
    is_lacking = np.zeros(records.num_rows, dtype=bool)
    for source, template in templates.items():
        rows = np.flatnonzero(np.asarray(pc.equal(records.column("source"), source)))
        if not len(rows):
            continue
        custom = records.column("custom").take(pa.array(rows)).combine_chunks()
        dataset_of = {int(year): config.file_under(source, int(year) or None) for year in np.unique(years[rows])}
        for piece in filter(None, map(str.strip, template.split(","))):
            texts: pa.Array = pa.array([""] * len(rows), pa.string())
            for literal, name, _, _ in Formatter().parse(piece):
                values = [pa.scalar(literal, pa.string())] if literal else []
                if name is not None:
                    values.append(_field(name, source, custom=custom, years=years[rows], dataset_of=dataset_of))
                if values:
                    texts = pc.binary_join_element_wise(texts, *values, "")
            is_lacking[rows[np.asarray(pc.is_null(texts))]] = True
            encoded = texts.dictionary_encode()
            numbers = np.array([*(words.number(clean_word(text)) for text in encoded.dictionary.to_pylist()), NO_WORD])
            table.add_to_group(rows, numbers[np.asarray(pc.fill_null(encoded.indices, -1))], group="custom")
    return int(is_lacking.sum())


def _tagger_ratings(tagger: pa.Table) -> Ids:
    lists = tagger.column("rating_probs").combine_chunks()
    numbers = np.full(tagger.num_rows, -1, dtype=np.int64)
    has_ratings = np.asarray(pc.equal(pc.fill_null(pc.list_value_length(lists), 0), len(RATINGS)))
    probs = np.asarray(pc.list_flatten(lists.filter(pa.array(has_ratings)))).reshape(-1, len(RATINGS))
    is_finite = np.isfinite(probs).all(axis=1)
    numbers[has_ratings] = np.where(is_finite, probs.argmax(axis=1), -1)
    return numbers


def _year_word(year: int, rules: DateWordsConfig) -> str:
    return clean_word(rules.year.replace("{year}", str(year))) if year else ""


def _first_number(custom: pa.Array, fields: tuple[str, ...]) -> npt.NDArray[np.float32]:
    """Return (N,) float32: of the first field that holds a number, NaN without one."""
    found = np.full(len(custom), np.nan, dtype=np.float32)
    for field in fields:
        texts = pc.map_lookup(custom, pa.scalar(field), "first").cast(pa.string())
        is_number = pc.fill_null(pc.match_substring_regex(texts, r"^-?\d+(\.\d+)?$"), False)
        values = pc.if_else(is_number, texts, pa.scalar(None, pa.string())).cast(pa.float32())
        found = np.where(np.isfinite(found), found, np.asarray(pc.fill_null(values, float("nan")), dtype=np.float32))
    return found


def _field(
    name: str, source: str, *, custom: pa.Array, years: Ids, dataset_of: Mapping[int, tuple[str, str]]
) -> pa.Array:
    """Return a custom template's field for some rows of one source, null where it is unknown."""
    if name == "source":
        return pa.array([source] * len(years), pa.string())
    if name == "year":
        return pa.array([str(year) if year else None for year in years.tolist()], pa.string())
    if name in ("dataset", "period"):
        place = 0 if name == "dataset" else 1
        return pa.array([dataset_of[year][place] or None for year in years.tolist()], pa.string())
    values = pc.map_lookup(custom, pa.scalar(name), "first").cast(pa.string())
    return pc.if_else(pc.equal(values, ""), pa.scalar(None, pa.string()), values)
