"""Cut captions that people have edited to the policy's number of tokens, by the rule that `compose` cuts all others.

But what people have added goes last. For the few captions that have edits: a cut before them would make an edit's
preview wrong. Sentences are not counted.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from captioning.clip_tokens import TokenCounter, keep_ranks
from captioning.edit_table import SEPARATOR
from captioning.policy import TokensConfig
from captioning.sentences import SENTENCE_GROUP
from captioning.word_table import Entries, fitting
from captioning.words import Words
from sharding.schema import CAPTIONS

_ADDED = ""
"""Stands for a group of its own, the last one to be cut; no group has this name."""


def cut_edited(
    captions: pa.Table, edits: pa.Table, *, counter: TokenCounter, tokens: TokensConfig, groups: Sequence[str]
) -> tuple[pa.Table, int, Counter[tuple[str, str]]]:
    """Return the captions with the edited ones cut, how many were too long, and the (group, word) that went.

    captions: CAPTIONS, with the edits (EDITS) applied. groups: the policy's order; a group that only edits know comes
    behind.
    """
    is_edited = np.asarray(pc.is_in(captions.column("key"), value_set=edits.column("key").unique()))
    rows = captions.filter(pa.array(is_edited)).to_pylist()
    added = {(edit["key"], word) for edit in edits.to_pylist() for word in edit["after"] if word not in edit["before"]}
    words = [
        _Word(place, group, word, is_added=(row["key"], word) in added)
        for place, row in enumerate(rows)
        for group, word in _words(row)
        if group != SENTENCE_GROUP
    ]
    stays = _fitting(words, counter=counter, tokens=tokens, groups=groups)
    gone: dict[int, set[tuple[str, str]]] = {}
    for word, fits in zip(words, stays, strict=True):
        if not fits:
            gone.setdefault(word.place, set()).add((word.group, word.text))
    for place, cut in gone.items():
        rows[place] = _without(rows[place], cut)
    places = np.arange(len(captions))
    places[is_edited] = len(captions) + np.arange(len(rows))
    both = pa.concat_tables([captions.cast(CAPTIONS), pa.Table.from_pylist(rows, schema=CAPTIONS)])
    return both.take(pa.array(places)), len(gone), Counter(word for cut in gone.values() for word in cut)


class _Word(NamedTuple):
    place: int
    group: str
    text: str
    is_added: bool
    """By people."""


def _words(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [(entry["group"], word) for entry in row["groups"] for word in entry["tags"]]


def _fitting(
    given: Sequence[_Word], *, counter: TokenCounter, tokens: TokensConfig, groups: Sequence[str]
) -> list[bool]:
    order = tuple(dict.fromkeys([_ADDED, *groups, *(word.group for word in given)]))
    words = Words()
    numbers = [(it.place, order.index(_ADDED if it.is_added else it.group), words.number(it.text)) for it in given]
    entries = Entries(*np.array(numbers, dtype=np.int64).reshape(-1, 3).T)
    ranks = keep_ranks(order, tokens.cut_first)
    kept: list[bool] = fitting(entries, counter=counter.of(words), max_tokens=tokens.max_tokens, ranks=ranks).tolist()
    return kept


def _without(row: dict[str, Any], gone: set[tuple[str, str]]) -> dict[str, Any]:
    kept = [word for word in _words(row) if word not in gone]
    names = dict.fromkeys(group for group, _ in kept)
    groups = [{"group": name, "tags": [text for group, text in kept if group == name]} for name in names]
    return {"key": row["key"], "text": SEPARATOR.join(text for _, text in kept), "groups": groups}
