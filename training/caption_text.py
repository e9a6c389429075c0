"""The caption a sample trains on: prefix, dropout, tags kept in front, warm-up, shuffle, tag dropout.

Pure, no torch, no tokenizer. Order of operations after kohya-ss sd-scripts' process_caption. Every draw comes from
the sample's identity; the warm-up depends on the global step, so it goes on where the last chunk ended.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from training.randomness import SampleIdentity, uniform


@dataclass(frozen=True)
class CaptionSettings:
    """What happens to captions; by default nothing. Raises ValueError for numbers out of range."""

    separator: str = ", "
    """Between tags. Parts are stripped and joined with it again, a bare comma as ", "."""
    shuffle: bool = False
    """Shuffle the tags that are not kept in front."""
    keep_first_tags: int = 0
    """The first so many tags stay in front."""
    keep_groups: tuple[str, ...] = ()
    """Then come the tags of these groups, in this order."""
    never_shuffled: tuple[str, ...] = ()
    """Then these tags, where a caption has them. All that is kept in front is never dropped or cut, either."""
    tag_dropout_fraction: float = 0.0
    """Probability of each other tag to be left out."""
    caption_dropout_fraction: float = 0.0
    """Probability of the caption to be empty."""
    token_warmup_min: int = 1
    """Tags (after those kept in front) at global step 0 of a warm-up."""
    token_warmup_steps: int = 0
    """Global step from which on all tags are used; 0 = no warm-up."""
    prefix: str = ""
    """Put before the caption with a space; sticks to the first tag, as there."""
    suffix: str = ""
    """Put behind the caption with a space; sticks to the last tag."""

    def __post_init__(self) -> None:
        for name in ("tag_dropout_fraction", "caption_dropout_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"captions.{name}: must be between 0 and 1, got {getattr(self, name)}")
        for name in ("keep_first_tags", "token_warmup_min", "token_warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"captions.{name}: must not be negative, got {getattr(self, name)}")
        if not self.separator.strip():
            raise ValueError(f"captions.separator: must be more than spaces, got {self.separator!r}")


def training_caption(
    text: str,
    groups: Sequence[Mapping[str, Any]] | None,
    *,
    settings: CaptionSettings,
    identity: SampleIdentity,
    global_step: int,
) -> str:
    """Return the caption of one showing of a sample; with everything off `text` verbatim.

    groups: the caption's {group, tags} in order, None when unknown. They name the tags for `keep_groups`, and keep a
    tag with a comma in it in one piece.
    """
    if (
        settings.caption_dropout_fraction > 0
        and uniform(identity, "caption_dropout") < settings.caption_dropout_fraction
    ):
        return ""
    is_warming_up = global_step < settings.token_warmup_steps
    if not (settings.shuffle or is_warming_up or settings.tag_dropout_fraction > 0):
        return _with_affixes(text, settings)

    parts = _split(text, groups or (), settings.separator.strip())
    if not parts:
        return _with_affixes("", settings)
    kept = _kept_in_front(parts, groups or (), settings)
    flexible = [index for index in range(len(parts)) if index not in set(kept)]
    if is_warming_up:
        share = global_step * (len(flexible) - settings.token_warmup_min) / settings.token_warmup_steps
        flexible = flexible[: math.floor(share) + settings.token_warmup_min]
    if settings.shuffle:
        # Sorting uniform numbers needs nothing of numpy that may change; its permutation might.
        order = np.argsort(identity.generator("tag_shuffle").random(len(flexible)), kind="stable")
        flexible = [flexible[position] for position in order]
    if settings.tag_dropout_fraction > 0:
        draws = identity.generator("tag_dropout").random(len(parts))  # a tag's draw does not depend on its place
        flexible = [index for index in flexible if draws[index] >= settings.tag_dropout_fraction]

    if settings.prefix:
        parts[0] = f"{settings.prefix} {parts[0]}"
    if settings.suffix:
        parts[-1] = f"{parts[-1]} {settings.suffix}"
    joint = ", " if settings.separator.strip() == "," else settings.separator
    return joint.join(parts[index] for index in [*kept, *flexible])


def _with_affixes(text: str, settings: CaptionSettings) -> str:
    return " ".join(part for part in (settings.prefix, text, settings.suffix) if part)


def _split(text: str, groups: Sequence[Mapping[str, Any]], separator: str) -> list[str]:
    """Split at the separator, strip, leave out empty parts; tags known from `groups` stay whole."""
    pieces = [piece.strip() for piece in text.split(separator)]
    with_separator = {
        tuple(piece.strip() for piece in tag.split(separator)): tag
        for group in groups
        for tag in group["tags"]
        if separator in tag
    }
    lengths = sorted({len(tag_pieces) for tag_pieces in with_separator}, reverse=True)
    parts, position = [], 0
    while position < len(pieces):
        length = next((n for n in lengths if tuple(pieces[position : position + n]) in with_separator), 1)
        part = with_separator[tuple(pieces[position : position + length])] if length > 1 else pieces[position]
        if part:
            parts.append(part)
        position += length
    return parts


def _kept_in_front(parts: list[str], groups: Sequence[Mapping[str, Any]], settings: CaptionSettings) -> list[int]:
    """Return the positions of the parts that stay in front, in their order."""
    kept = dict.fromkeys(range(min(settings.keep_first_tags, len(parts))))
    for name in settings.keep_groups:
        tags = {tag.strip() for group in groups if group["group"] == name for tag in group["tags"]}
        kept |= dict.fromkeys(index for index, part in enumerate(parts) if part in tags)
    kept |= dict.fromkeys(index for index, part in enumerate(parts) if part in settings.never_shuffled)
    return list(kept)
