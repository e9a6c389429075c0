"""A captioner's sentences in captions: alone, instead of tags for a share of the pictures, or behind the tags.

A picture that the captioner said nothing about keeps its tags. Which pictures get sentences depends on seed and key
alone, so it is the same in every part and on every machine.
"""

import hashlib
from typing import Literal

import pyarrow as pa
from pydantic import Field

from sharding.config import Config
from sharding.schema import CAPTIONS

SENTENCE_GROUP = "sentence"
"""The group in which the sentences stand, as one tag; always the last."""


class SentencesConfig(Config):
    """Whether and how what a captioner said becomes part of captions."""

    captioner: str = ""
    """The captioner; empty: no sentences."""
    use: Literal["appended", "alone", "mixed"] = "appended"
    """appended: behind the tags. alone: instead of them. mixed: instead of them for `ratio` of the pictures."""
    ratio: float = Field(0.5, ge=0, le=1)
    """With mixed: the share of pictures with sentences; the others have tags."""
    seed: int = 0
    """With mixed: another one chooses other pictures."""


def with_sentences(captions: pa.Table, texts: pa.Table, rules: SentencesConfig) -> pa.Table:
    """Return the captions with sentences by the rules. captions: CAPTIONS; texts: schema.TEXTS, the same rows."""
    rows = captions.to_pylist()
    for row, sentence in zip(rows, texts.column("text").to_pylist(), strict=True):
        if not sentence or (rules.use == "mixed" and not _is_chosen(row["key"], rules)):
            continue
        group = {"group": SENTENCE_GROUP, "tags": [sentence]}
        if rules.use == "appended":
            row["text"] = f"{row['text']}, {sentence}" if row["text"] else sentence
            row["groups"] = [*row["groups"], group]
        else:
            row["text"], row["groups"] = sentence, [group]
    return pa.Table.from_pylist(rows, schema=CAPTIONS)


def _is_chosen(key: str, rules: SentencesConfig) -> bool:
    digest = hashlib.sha256(f"sentences {rules.seed} {key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < rules.ratio * 2**64
