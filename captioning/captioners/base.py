"""What captioners share: the rules that clean what a model says, and the rows that come of it.

Rules have a name and a version, which is part of a part's digest: raw text is made anew when rules change.
"""

import re
from collections.abc import Sequence
from typing import Literal

from captioning.plugin import OK, Row, empty_row
from sharding.schema import TEXTS

Cleaning = Literal["sentences/1", "none"]
NO_TEXT = "no_text"
"""Status of a picture that the model said nothing about, or nothing that is left after cleaning."""

_OPENINGS = (
    re.compile(r"^(?:sure|certainly|of course|okay|absolutely)\s*[,!.:]\s*", re.IGNORECASE),
    re.compile(r"^here(?:'s|’s| is| are)\b[^:.\n]{0,80}:\s*", re.IGNORECASE),
    re.compile(r"^(?:caption|description|answer|assistant)\s*:\s*", re.IGNORECASE),
)
_DISCLAIMER = re.compile(r"\b(?:as an ai|i (?:can't|cannot|can not|am unable to|'m sorry)|i'm sorry)\b", re.IGNORECASE)
_REPEATED_WORDS = re.compile(r"\b(\w+(?:[ ,]+\w+){0,5}?)(?:[ ,]+\1\b){2,}", re.IGNORECASE)
"""Up to six words, three times or more in a row: what a small model does when it is stuck."""
_MOST_ROUNDS = 10


def clean_text(text: str, *, prompt: str = "", rules: Cleaning = "sentences/1") -> str:
    """Return the sentences that speak of the picture, on one line; "" when none is left.

    Taken out until nothing changes: the prompt in front, "Sure!", "Here is the caption:", words said three times and
    more in a row, a sentence said before, a sentence in which the model speaks of itself, and after a whole sentence
    one that breaks off.
    """
    text = " ".join(text.split())
    if rules == "none":
        return text
    for _ in range(_MOST_ROUNDS):
        before = text
        text = _without_opening(text, " ".join(prompt.split()))
        text = _REPEATED_WORDS.sub(r"\1", text)
        text = " ".join(_kept_sentences(text))
        if text == before:
            break
    return text


def text_rows(texts: Sequence[str], prompts: Sequence[str], *, rules: Cleaning) -> list[Row]:
    """Return schema.TEXTS rows without keys."""
    rows = []
    for text, prompt in zip(texts, prompts, strict=True):
        cleaned = clean_text(text, prompt=prompt, rules=rules)
        values = {"text": cleaned, "status": OK} if cleaned else empty_row(TEXTS, NO_TEXT)
        rows.append(values | {"prompt": prompt})
    return rows


def _without_opening(text: str, prompt: str) -> str:
    text = text.strip().strip('"“”').strip()
    if prompt and text.casefold().startswith(prompt.casefold()):
        text = text[len(prompt) :].lstrip(" :-\n")
    for opening in _OPENINGS:
        text = opening.sub("", text)
    return text


def _kept_sentences(text: str) -> list[str]:
    sentences = [it for it in re.split(r"(?<=[.!?])\s+", text) if it]
    if len(sentences) > 1 and not sentences[-1].endswith((".", "!", "?", '"', "”", ")")):
        sentences.pop()
    kept: dict[str, str] = {}
    for sentence in sentences:
        if not _DISCLAIMER.search(sentence):
            kept.setdefault(sentence.casefold(), sentence)
    return list(kept.values())
