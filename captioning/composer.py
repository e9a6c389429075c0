"""One policy at work: records and annotations of a part → captions, in memory. `compose` runs it over a workspace.

A composer remembers tags and words from part to part, so keep one for many parts. Captions do not depend on that.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from captioning import record_words, tag_stream
from captioning.clip_tokens import keep_ranks, load_counter
from captioning.config import CaptioningConfig
from captioning.edit_table import apply_edits
from captioning.edited_length import cut_edited
from captioning.lexicon import COUNT_TAGS, Lexicon, LexiconArrays
from captioning.part_input import PartInput, check_model, read_input, read_labels
from captioning.sentences import with_sentences
from captioning.spelling import spell_tag
from captioning.tag_stream import Labels, TagStream
from captioning.taggers.base import TaggerSettings
from captioning.word_table import Entries, WordTable, fitting, with_fallback
from captioning.words import NO_WORD, Ids, Words
from sharding.config import ConfigError
from sharding.schema import Workspace


@dataclass
class PartCaptions:
    """Captions of one part, schema.CAPTIONS, and what there is to say about them."""

    captions: pa.Table
    missing: dict[str, int] = field(default_factory=dict)
    """By group: pictures without a word for want of a value."""
    num_cut: int = 0
    """Captions shortened to the largest number of tokens."""
    cut: Counter[tuple[str, str]] = field(default_factory=Counter)
    """What was cut off: (group, word) → times."""
    num_cut_edited: int = 0
    """Captions shortened to it because of edits; what went is in `cut`, too."""
    num_many_tags: int = 0
    """Captions with more words than `warn_above_tags`."""
    num_fallback: int = 0
    """Captions without any word, which have those of `fallback`."""


class Composer:
    """Makes the captions of parts by one policy. Raises ConfigError for an unknown one, ModelError for a tokenizer."""

    def __init__(self, config: CaptioningConfig, workspace: Workspace, *, policy: str) -> None:
        if policy not in config.policies:
            raise ConfigError(f"policy {policy!r}: unknown; the dataset has {', '.join(config.policies) or 'none'}")
        self.rules = rules = config.policies[policy]
        self._config, self._workspace = config, workspace
        spelled = [spell_tag(tag, remove_underscores=True, keep_underscores=frozenset()) for tag in COUNT_TAGS]
        both = dict.fromkeys(word for pair in zip(spelled, COUNT_TAGS, strict=True) for word in pair)
        orders = tuple(both) if "count" in rules.groups else ()
        self._words = Words(replace=rules.replace, first=rules.first_words, orders=orders)
        self.lexicon = Lexicon(rules, self._words)
        self._labels: Labels | None = None
        self._model_digest = ""
        self._counter = load_counter(rules.tokens.tokenizer, self._words) if rules.tokens.max_tokens else None
        self._keep_ranks = keep_ranks(rules.groups, rules.tokens.cut_first)

    def part(self, part: Path, *, edits: pa.Table | None = None) -> PartCaptions:
        """Return the captions of one kept part, with people's edits (schema EDITS) of it, if any.

        Raises AnnotationMissingError, DamagedPartError.
        """
        rules, given = self.rules, read_input(self._workspace, part, self.rules)
        table = WordTable(given.records.num_rows, groups=rules.groups, words=self._words)
        missing = self._add_own_words(table, given)
        self._add_all_tags(table, part, given)
        found = self._finished(table, given.records.column("key"))
        found.missing = {group: number for group, number in missing.items() if number}
        if captioner := rules.sentences.captioner:
            found.captions = with_sentences(found.captions, given.annotations[captioner], rules.sentences)
        if fallback := rules.fallback_words:
            found.captions, found.num_fallback = with_fallback(found.captions, fallback, group=rules.fallback_group)
        if edits is not None and len(edits):
            self._edit(found, edits)
        return found

    def _add_own_words(self, table: WordTable, given: PartInput) -> dict[str, int]:
        """Add what a picture has one of or its source gives; return the pictures without a value by group."""
        rules, words = self.rules, self._words
        missing: dict[str, int] = {}
        ratings = record_words.ratings(given, rules)
        for group, tiers in rules.tiers.items():
            missing |= record_words.add_tiers(table, words, given, tiers, group=group, rating=ratings)
        years = given.years(rules.date.model)
        missing |= record_words.add_dates(table, words, self._config, given, years, rules=rules.date)
        if rules.custom:
            missing["custom"] = record_words.add_custom(
                table, words, self._config, given.records, years, templates=rules.custom
            )
        if "rating" in rules.groups:
            missing["rating"] = record_words.add_ratings(table, words, ratings, rules)
        return missing

    def _add_all_tags(self, table: WordTable, part: Path, given: PartInput) -> None:
        streams = self._streams(part, given)
        known, bits = self.lexicon.arrays(), self._source_bits(given)
        streams = tag_stream.without_barred(tag_stream.with_added(streams, known), known, bits)
        streams = tag_stream.without_removed(streams, known)
        if "style" in self.rules.groups:
            streams = self._take_styles(table, given, given.years(self.rules.date.model), streams)
        for stream in streams:
            self._add_tags(table, stream, known, bits)

    def _edit(self, found: PartCaptions, edits: pa.Table) -> None:
        rules = self.rules
        found.captions = apply_edits(found.captions, edits, groups=rules.groups)
        if self._counter is not None:
            found.captions, found.num_cut_edited, cut = cut_edited(
                found.captions, edits, counter=self._counter, tokens=rules.tokens, groups=rules.groups
            )
            found.cut.update(cut)

    def tags(self, part: Path) -> tuple[TagStream, LexiconArrays]:
        """Return all tags of a part that pass, before tags remove each other; rows in no order."""
        streams = self._streams(part, read_input(self._workspace, part, self.rules))
        empty = np.empty(0, dtype=np.int64)
        rows, tags = (np.concatenate([empty, *(getattr(it, name) for it in streams)]) for name in ("rows", "tags"))
        return TagStream(rows, tags), self.lexicon.arrays()

    def _streams(self, part: Path, given: PartInput) -> list[TagStream]:
        tagger = self.rules.tags.tagger
        streams = self._source_characters(given.records)
        for origin in self.rules.tags.prefer:
            if origin == "record":
                streams += tag_stream.record_tags(given.records, self.rules.tags, self.lexicon)
            elif tagger:
                stream = self._tagger_tags(part, given.annotations[tagger])
                may_be_tagged = self.lexicon.arrays().may_be_tagged
                streams.append(stream.where(may_be_tagged[stream.tags] > 0))
        return tag_stream.without_barred(streams, self.lexicon.arrays(), self._source_bits(given))

    def _source_bits(self, given: PartInput) -> Ids | None:
        """Return (N,): the bit of a picture's source in `barred`, 0 for sources without a list; None without lists."""
        listed = pa.array(self.rules.tags.source_blacklist, pa.string())
        if not len(listed):
            return None
        places = pc.index_in(given.records.column("source"), value_set=listed)
        found = np.asarray(pc.fill_null(places, -1), dtype=np.int64)
        return np.where(found < 0, 0, np.left_shift(1, np.maximum(found, 0)))

    def _tagger_tags(self, part: Path, annotation: pa.Table) -> TagStream:
        tagger = self.rules.tags.tagger
        if self._labels is None:
            table, self._model_digest = read_labels(self._workspace, tagger)
            self._labels = Labels.of(table, self.lexicon)
        check_model(self._workspace, part, tagger, model_digest=self._model_digest)
        settings = self._config.annotate.models[tagger]
        floor = settings.floor if isinstance(settings, TaggerSettings) else 0.0
        return tag_stream.tagger_tags(annotation, self._labels, self.rules.tags, floor=floor)

    def _source_characters(self, records: pa.Table) -> list[TagStream]:
        streams = []
        for source, character in self.rules.characters.items():
            rows = np.flatnonzero(np.asarray(pc.equal(records.column("source"), source)))
            (number,) = self.lexicon.numbers([character], "character")
            stream = TagStream(rows, np.full(len(rows), number, dtype=np.int64))
            streams.append(stream.where(stream.tags >= 0))
        return streams

    def _take_styles(self, table: WordTable, given: PartInput, years: Ids, streams: list[TagStream]) -> list[TagStream]:
        style_of = self.lexicon.arrays().style_years
        rows = np.concatenate([it.rows[style_of[it.tags] > 0] for it in streams] or [years[:0]])
        styles = np.concatenate([style_of[it.tags[style_of[it.tags] > 0]] for it in streams] or [years[:0]])
        record_words.add_styles(table, self._words, given, years, tagged=(rows, styles), rules=self.rules.style)
        return [it.where(style_of[it.tags] < 0) for it in streams]

    def _add_tags(self, table: WordTable, stream: TagStream, known: LexiconArrays, bits: Ids | None) -> None:
        rows, tags = stream.rows, stream.tags
        if self.rules.tags.kohya_characters:
            rows, tags = self._add_characters_as_kohya(table, rows, tags, known, bits)
        table.add(rows, known.words[tags], groups=known.groups[tags])
        if self.rules.tags.character_tag_expand:
            series = self._place_of_series()
            words = _series_words(rows, tags, known, bits)
            table.add(rows, words, groups=np.full(len(rows), series, dtype=np.int64))

    def _add_characters_as_kohya(
        self, table: WordTable, rows: Ids, tags: Ids, known: LexiconArrays, bits: Ids | None
    ) -> tuple[Ids, Ids]:
        """Add characters in reverse order, each with its series behind; return the other tags."""
        is_character = known.is_character[tags] > 0
        places = np.flatnonzero(is_character)[::-1]
        places = places[np.argsort(rows[places], kind="stable")]
        series = _series_words(rows[places], tags[places], known, bits)
        pairs = np.stack([known.words[tags[places]], series], axis=1)
        groups = np.repeat(known.groups[tags[places]], 2)
        table.add(np.repeat(rows[places], 2), pairs.reshape(-1), groups=groups)
        return rows[~is_character], tags[~is_character]

    def _place_of_series(self) -> int:
        groups = self.rules.groups
        return next((groups.index(group) for group in ("series", "rest") if group in groups), -1)

    def _finished(self, table: WordTable, keys: pa.ChunkedArray) -> PartCaptions:
        entries, tokens = table.entries(), self.rules.tokens
        num_cut, cut = 0, Counter[tuple[str, str]]()
        if self._counter is not None:
            kept = fitting(entries, counter=self._counter, max_tokens=tokens.max_tokens, ranks=self._keep_ranks)
            num_cut, cut = len(np.unique(entries.rows[~kept])), self._count(table, entries.where(~kept))
            entries = entries.where(kept)
        many = self.rules.warn_above_tags
        num_many = int((np.bincount(entries.rows) > many).sum()) if many and len(entries.rows) else 0
        return PartCaptions(table.captions(keys, entries), num_cut=num_cut, cut=cut, num_many_tags=num_many)

    def _count(self, table: WordTable, entries: Entries) -> Counter[tuple[str, str]]:
        texts = self._words.texts()
        pairs, counts = np.unique(entries.ids * len(table.groups) + entries.groups, return_counts=True)
        return Counter(
            {
                (table.groups[pair % len(table.groups)], texts[pair // len(table.groups)].as_py()): count
                for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True)
            }
        )


def _series_words(rows: Ids, tags: Ids, known: LexiconArrays, bits: Ids | None) -> Ids:
    """Return the words of the series in characters' parentheses, none where the picture's source bars it."""
    if bits is None:
        return known.series_words[tags]
    return np.where(known.barred_series[tags] & bits[rows] == 0, known.series_words[tags], NO_WORD)
