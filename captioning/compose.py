"""Raw annotations and records → captions, by a policy. No model, no torch, no image is opened.

For every part of workspace.kept the part of the same name in captions/<policy>/. A missing score gives no word and is
counted; it never becomes the worst tier. Order, thresholds and words all come from the policy.
"""

import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from string import Formatter

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captioning.config import CaptioningConfig, DateWordsConfig, PolicyConfig, TagsConfig
from captioning.spelling import clean_word, expand_character, spell_tag
from captioning.taggers.base import LABELS_FILE
from captioning.tiers import passes, tier_numbers
from captioning.word_table import NO_WORD, Ids, WordTable
from sharding.config import ConfigError
from sharding.files import digest_of
from sharding.runlog import EventLog, Progress
from sharding.schema import RATINGS, TAG_CATEGORIES, Workspace
from sharding.tables import DamagedPartError, is_current, list_parts, owned_parts, part_metadata, read_part, write_part

logger = logging.getLogger(__name__)

_VERSION = 1
_GROUP_OF_CATEGORY = {
    "general": "rest", "character": "character", "copyright": "series", "artist": "artist", "meta": "meta",
}  # fmt: skip
_RECORD_COLUMNS = ("key", "source", "created_at", "rating", "custom", *(f"tags_{name}" for name in TAG_CATEGORIES))


class AnnotationMissingError(ValueError):
    """Annotations that the policy needs are absent, or belong to other keys or another model."""


@dataclass(frozen=True)
class ComposeReport:
    """What one call of `compose` did."""

    policy: str
    num_parts: int
    num_parts_current: int
    num_parts_written: int
    num_captions: int
    """In the parts written by this call (or that a dry run would write)."""
    num_empty: int
    missing: Mapping[str, int]
    """By group: pictures that got no word because there was no score, rating, date or field."""
    is_dry_run: bool
    seconds: float

    def summary(self) -> str:
        """Return a few lines for people."""
        verb = "to write" if self.is_dry_run else "written"
        lines = [
            f"compose {self.policy}: {self.num_parts} parts, {self.num_parts_current} already current, "
            f"{self.num_parts_written} {verb}, {self.num_captions:,} captions in {self.seconds:.1f} s"
        ]
        lines += [f"  without a word for {group}: {number:,}" for group, number in sorted(self.missing.items())]
        if self.num_empty:
            lines.append(f"  empty captions: {self.num_empty:,}")
        return "\n".join(lines)


def compose(
    config: CaptioningConfig,
    workspace: Workspace,
    *,
    policy: str,
    part_index: int = 0,
    num_parts: int = 1,
    dry_run: bool = False,
) -> ComposeReport:
    """Write the captions of each owned part that is not current.

    Raises ConfigError for an unknown policy, FileNotFoundError without kept parts, AnnotationMissingError when
    `annotate` has to run first.
    """
    if policy not in config.policies:
        raise ConfigError(f"policy {policy!r}: unknown; the dataset has {', '.join(config.policies) or 'none'}")
    kept = list_parts(workspace.kept)
    if not kept:
        raise FileNotFoundError(f"{workspace.kept}: no parts; run `python -m sharding dedupe` first")
    owned = owned_parts(kept, part_index, num_parts)
    rules = config.policies[policy]
    policy_digest = _policy_digest(config, rules)
    started = time.monotonic()
    missing: Counter[str] = Counter()
    num_written = num_captions = num_empty = 0
    with Progress(len(owned), unit="parts", title=f"compose {policy}") as progress:
        for part in owned:
            sources = _annotation_parts(workspace, part, rules)
            made_from = digest_of([policy_digest, _content_of(part), *map(_content_of, sources.values())])
            target = workspace.captions(policy) / part.name
            if not is_current(target, made_from):
                num_written += 1
                if dry_run:
                    num_captions += read_part(part, ["key"]).num_rows
                else:
                    captions, part_missing = compose_part(config, workspace, part, policy=policy)
                    metadata = {"policy": policy, "policy_digest": policy_digest}
                    write_part(target, captions, made_from=made_from, metadata=metadata)
                    EventLog(workspace.events, stage="compose").write(
                        "part_written", part=f"{policy}/{part.name}", captions=captions.num_rows, missing=part_missing
                    )
                    missing.update(part_missing)
                    num_captions += captions.num_rows
                    num_empty += int(pc.sum(pc.equal(captions.column("text"), "")).as_py() or 0)
            progress.advance()
    return ComposeReport(
        policy=policy,
        num_parts=len(owned),
        num_parts_current=len(owned) - num_written,
        num_parts_written=num_written,
        num_captions=num_captions,
        num_empty=num_empty,
        missing=dict(missing),
        is_dry_run=dry_run,
        seconds=time.monotonic() - started,
    )


def compose_part(
    config: CaptioningConfig, workspace: Workspace, part: Path, *, policy: str
) -> tuple[pa.Table, dict[str, int]]:
    """Return schema.CAPTIONS of one kept part, and by group how many pictures lack a word for want of a value."""
    rules = config.policies[policy]
    records = read_part(part, _RECORD_COLUMNS)
    annotations = {
        model: _aligned(path, records.column("key"))
        for model, path in _annotation_parts(workspace, part, rules).items()
    }
    table = WordTable(records.num_rows, groups=rules.groups)
    missing: dict[str, int] = {}
    for group, tiers in rules.tiers.items():
        numbers = tier_numbers(
            _scores(annotations[tiers.model]), [threshold for threshold, _ in tiers.steps], comparison=tiers.comparison
        )
        # The last entry is what NO_TIER, -1, picks.
        words = [*(table.word(word) for _, word in tiers.steps), table.word(tiers.rest), NO_WORD]
        table.add_to_group(np.arange(records.num_rows), np.array(words)[numbers], group=group)
        missing[group] = int((numbers < 0).sum())
    years = _years(records, annotations, rules.date)
    if "date" in rules.groups:
        missing["date"] = _add_dates(table, config, records, years, sources=rules.date.sources)
    if rules.custom:
        missing["custom"] = _add_custom(table, config, records, years, templates=rules.custom)
    tagger = annotations.get(rules.tags.tagger)
    if "rating" in rules.groups:
        missing["rating"] = _add_ratings(table, records, tagger, rules)
    labels = _labels(workspace, part, rules.tags.tagger) if tagger is not None else None
    for origin in rules.tags.prefer:
        if origin == "record":
            _add_record_tags(table, records, rules.tags)
        elif tagger is not None and labels is not None:
            _add_tagger_tags(table, tagger, labels, rules.tags)
    return table.captions(records.column("key")), {group: number for group, number in missing.items() if number}


# --- groups of words ---


def _add_dates(
    table: WordTable, config: CaptioningConfig, records: pa.Table, years: Ids, *, sources: tuple[str, ...]
) -> int:
    wanted = np.ones(len(years), dtype=bool)
    if sources:
        wanted = np.asarray(pc.is_in(records.column("source"), value_set=pa.array(sources)))
    distinct, which = np.unique(years, return_inverse=True)
    words = np.array([table.word(config.period_of(int(year)) if year else "") for year in distinct], dtype=np.int64)
    chosen = np.where(wanted, words[which] if len(years) else which, NO_WORD)
    table.add_to_group(np.arange(len(years)), chosen, group="date")
    return int((wanted & (chosen < 0)).sum())


def _add_ratings(table: WordTable, records: pa.Table, tagger: pa.Table | None, rules: PolicyConfig) -> int:
    chosen = np.full(records.num_rows, -1, dtype=np.int64)
    for origin in rules.rating.prefer:
        if origin == "tagger" and tagger is not None:
            numbers = _tagger_ratings(tagger)
        elif origin == "record":
            numbers = np.asarray(pc.fill_null(pc.index_in(records.column("rating"), pa.array(RATINGS)), -1))
        else:
            continue
        chosen = np.where(chosen < 0, numbers, chosen)
    words = np.array([*(table.word(word) for word in rules.rating.words), NO_WORD])
    table.add_to_group(np.arange(records.num_rows), words[chosen], group="rating")
    return int((chosen < 0).sum())


def _tagger_ratings(tagger: pa.Table) -> Ids:
    lists = tagger.column("rating_probs").combine_chunks()
    numbers = np.full(tagger.num_rows, -1, dtype=np.int64)
    has_ratings = np.asarray(pc.equal(pc.fill_null(pc.list_value_length(lists), 0), len(RATINGS)))
    probs = np.asarray(pc.list_flatten(lists.filter(pa.array(has_ratings)))).reshape(-1, len(RATINGS))
    numbers[has_ratings] = probs.argmax(axis=1)
    return numbers


def _add_custom(
    table: WordTable, config: CaptioningConfig, records: pa.Table, years: Ids, *, templates: Mapping[str, str]
) -> int:
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
            words = np.array([*(table.word(clean_word(text)) for text in encoded.dictionary.to_pylist()), NO_WORD])
            chosen = words[np.asarray(pc.fill_null(encoded.indices, -1))]
            table.add_to_group(rows, chosen, group="custom")
    return int(is_lacking.sum())


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


def _add_record_tags(table: WordTable, records: pa.Table, rules: TagsConfig) -> None:
    for category in rules.record_categories:
        lists = records.column(f"tags_{category}").combine_chunks()
        encoded = pc.list_flatten(lists).dictionary_encode()
        rows = np.asarray(pc.list_parent_indices(lists), dtype=np.int64)
        speller = _Speller(table, rules, [(tag, category) for tag in encoded.dictionary.to_pylist()])
        speller.add(rows, np.asarray(encoded.indices, dtype=np.int64))


def _add_tagger_tags(table: WordTable, tagger: pa.Table, labels: pa.Table, rules: TagsConfig) -> None:
    lists = tagger.column("tag_ids").combine_chunks()
    rows = np.asarray(pc.list_parent_indices(lists), dtype=np.int64)
    ids = np.asarray(pc.list_flatten(lists), dtype=np.int64)
    probs = np.asarray(pc.list_flatten(tagger.column("tag_probs").combine_chunks()), dtype=np.float32)
    tags = list(zip(labels.column("name").to_pylist(), labels.column("category").to_pylist(), strict=True))
    limits = np.array(
        [rules.character_threshold if kind == "character" else rules.general_threshold for _, kind in tags],
        dtype=np.float32,
    )
    chosen = passes(probs, limits[ids], comparison=rules.comparison)
    _Speller(table, rules, tags).add(rows[chosen], ids[chosen])


class _Speller:
    """Numbered (tag, category) pairs → words and their groups; each pair is looked at once."""

    def __init__(self, table: WordTable, rules: TagsConfig, tags: list[tuple[str, str]]) -> None:
        self._table = table
        self._group_of = {category: self._place(group) for category, group in _GROUP_OF_CATEGORY.items()}
        keep, drop = _frozen(rules.keep_underscores), frozenset(rules.drop_tags)
        remove = rules.remove_underscores

        def spell(tag: str) -> int:
            return table.word(spell_tag(tag, remove_underscores=remove, keep_underscores=keep)) if tag else NO_WORD

        words, series_words, groups = [], [], []
        for tag, category in tags:
            series = ""
            if category == "character" and rules.character_tag_expand:
                name, series = expand_character(tag)
            else:
                name = tag
            is_dropped = tag in drop or category not in self._group_of
            words.append(NO_WORD if is_dropped else spell(name))
            series_words.append(NO_WORD if is_dropped or series in drop else spell(series))
            groups.append(self._group_of.get(category, -1))
        self._words = np.array(words, dtype=np.int64)
        self._series_words = np.array(series_words, dtype=np.int64)
        self._groups = np.array(groups, dtype=np.int64)

    def add(self, rows: Ids, numbers: Ids) -> None:
        """Add tags, by their numbers, to rows."""
        if not len(rows):
            return
        self._table.add(rows, self._words[numbers], groups=self._groups[numbers])
        series_group = np.full(len(rows), self._group_of["copyright"], dtype=np.int64)
        self._table.add(rows, self._series_words[numbers], groups=series_group)

    def _place(self, group: str) -> int:
        group = group if group in self._table.groups else "rest"
        return self._table.groups.index(group) if group in self._table.groups else -1


@lru_cache(maxsize=8)
def _frozen(tags: tuple[str, ...]) -> frozenset[str]:
    """Return one and the same set for the same tags, so that remembered spellings are found by identity."""
    return frozenset(tags)


# --- what goes in ---


def _scores(annotation: pa.Table) -> npt.NDArray[np.float32]:
    """Return (N,) float32, NaN where the status is not ok."""
    scores = np.asarray(pc.fill_null(annotation.column("score"), float("nan")), dtype=np.float32).copy()
    scores[np.asarray(pc.not_equal(annotation.column("status"), "ok"))] = np.nan
    return scores


def _years(records: pa.Table, annotations: Mapping[str, pa.Table], rules: DateWordsConfig) -> Ids:
    """Return (N,) years, 0 where there is no date."""
    if rules.model:
        scores = _scores(annotations[rules.model])
        return np.where(np.isfinite(scores), scores, 0).astype(np.int64)
    return np.asarray(pc.fill_null(pc.year(records.column("created_at")), 0), dtype=np.int64)


def _annotation_parts(workspace: Workspace, part: Path, rules: PolicyConfig) -> dict[str, Path]:
    names = [tiers.model for tiers in rules.tiers.values()] + [rules.date.model, rules.tags.tagger]
    paths = {name: workspace.annotations(name) / part.name for name in dict.fromkeys(names) if name}
    for name, path in paths.items():
        if not path.is_file():
            raise AnnotationMissingError(f"{path}: missing; run `python -m captioning annotate --models {name}` first")
    return paths


def _aligned(path: Path, keys: pa.ChunkedArray) -> pa.Table:
    """Return the annotation in the order of `keys`. Raises AnnotationMissingError when one of them has no row."""
    annotation = read_part(path)
    if annotation.column("key").equals(keys):
        return annotation
    places = pc.index_in(keys, value_set=annotation.column("key"))
    if places.null_count:
        first = keys.filter(pc.is_null(places))[0].as_py()
        raise AnnotationMissingError(
            f"{path}: {places.null_count:,} of {len(keys):,} keys have no row, first {first}; "
            "run `python -m captioning annotate` first"
        )
    return annotation.take(places)


def _labels(workspace: Workspace, part: Path, tagger: str) -> pa.Table:
    folder = workspace.annotations(tagger)
    path = folder / LABELS_FILE
    if not path.is_file():
        raise AnnotationMissingError(f"{path}: missing; run `python -m captioning annotate --models {tagger}` first")
    model, of_part = part_metadata(path).get("model_digest"), part_metadata(folder / part.name).get("model_digest")
    if model != of_part:
        raise AnnotationMissingError(
            f"{folder / part.name}: made by another model than {LABELS_FILE}; run "
            f"`python -m captioning annotate --models {tagger}` until all parts are current"
        )
    return read_part(path)


def _content_of(part: Path) -> list[str]:
    """Return what identifies the rows of a part: its digest, and for annotations which rows have a result."""
    facts = part_metadata(part)
    if "made_from" not in facts:
        raise DamagedPartError(f"{part}: says not what it was made from; delete it and run its stage again")
    return [facts["made_from"], facts.get("statuses", "")]


def _policy_digest(config: CaptioningConfig, rules: PolicyConfig) -> str:
    datasets = {name: source.dataset or name for name, source in config.sources.items()}
    return digest_of([_VERSION, rules.model_dump(mode="json"), config.model_dump(mode="json")["periods"], datasets])
