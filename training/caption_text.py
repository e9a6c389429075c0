"""The caption a sample trains on: dropout, one of several texts, wildcards, kept tags, warm-up, shuffle, tag dropout.

Pure, no torch, no tokenizer. The order of operations is that of kohya-ss sd-scripts' process_caption; `compat` gives
its peculiarities, too. Every draw comes from the sample's identity, so the same showing has the same caption on any
number of processes; the warm-up depends on the global step, so it goes on where the last chunk ended.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from training.caption_parts import Part, split_parts, split_segments
from training.caption_settings import SENTENCE_GROUP, CaptionSettings
from training.randomness import SampleIdentity, uniform
from training.wildcards import Segment, expand

__all__ = ["CaptionSettings", "training_caption"]


def training_caption(
    text: str,
    groups: Sequence[Mapping[str, Any]] | None,
    *,
    settings: CaptionSettings,
    identity: SampleIdentity,
    global_step: int,
) -> str:
    """Return the caption of one showing of a sample; with everything off `text` verbatim.

    groups: the caption's {group, tags} in order, None when unknown. They name the tags for the settings that speak of
    groups, tell tags from sentences, and keep a tag with a comma in it in one piece.
    """
    if _is_dropped(settings, identity):
        return ""
    is_kohya = settings.compat == "kohya"
    if is_kohya:
        text = f"{settings.prefix} {text}" if settings.prefix else text
        text = f"{text} {settings.suffix}" if settings.suffix else text
    text = _line(text, settings, identity)
    affixes = ("", "") if is_kohya else (settings.prefix, settings.suffix)
    segments, *around = _expanded([text, *affixes], settings, identity)
    if settings.takes_apart or (not is_kohya and _has_marks(text, settings)):
        caption = _rebuilt(segments, () if is_kohya else groups or (), settings, identity, global_step)
    else:
        caption = _plain(segments)
    if is_kohya:
        if settings.secondary_separator:
            caption = caption.replace(settings.secondary_separator, settings.separator)
        return caption
    return _joined(_plain(around[0]), caption, _plain(around[1]))


def _is_dropped(settings: CaptionSettings, identity: SampleIdentity) -> bool:
    every = settings.caption_dropout_every_epochs
    if every and (identity.epoch + 1) % every == 0:
        return True
    fraction = settings.caption_dropout_fraction
    return fraction > 0 and uniform(identity, "caption_dropout") < fraction


def _joined(*texts: str) -> str:
    return " ".join(text for text in texts if text)


def _line(text: str, settings: CaptionSettings, identity: SampleIdentity) -> str:
    if settings.lines == "all" or "\n" not in text:
        return text
    lines = text.split("\n")
    if settings.compat != "kohya":
        lines = [line.strip() for line in lines if line.strip()] or [""]
    if settings.lines == "first":
        return lines[0]
    weights = settings.line_weights or (1.0,)
    return lines[_weighted([*weights, *[weights[-1]] * len(lines)][: len(lines)], uniform(identity, "caption_line"))]


def _weighted(weights: Sequence[float], number: float) -> int:
    """Return the place that `number` in [0, 1) falls on. weights: not negative; if all are 0, the first."""
    sums = list(accumulate(weights))
    return next((place for place, total in enumerate(sums) if number * sums[-1] < total), 0)


def _expanded(texts: Sequence[str], settings: CaptionSettings, identity: SampleIdentity) -> list[list[Segment]]:
    if not settings.wildcards or not any("{" in text or "}" in text for text in texts):
        return [[Segment(text, text, False)] for text in texts]
    draw = identity.generator("caption_wildcards").random
    found = [expand(text, draw=draw, nested=settings.compat != "kohya") for text in texts]
    if settings.compat == "kohya":  # which splits only what it has written
        return [[Segment(_plain(segments), _plain(segments), False)] for segments in found]
    return found


def _plain(segments: Sequence[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def _has_marks(text: str, settings: CaptionSettings) -> bool:
    return any(mark and mark in text for mark in (settings.keep_separator, settings.secondary_separator))


# --- take apart, choose, order, join ---


def _rebuilt(
    segments: list[Segment],
    groups: Sequence[Mapping[str, Any]],
    settings: CaptionSettings,
    identity: SampleIdentity,
    global_step: int,
) -> str:
    is_kohya = settings.compat == "kohya"
    sections = _kohya_sections(segments, settings) if is_kohya else _sections(segments, groups, settings)
    parts = [part for section in sections for part in section]
    if not parts:
        return ""
    sentences = [place for place, part in enumerate(parts) if part.group == SENTENCE_GROUP]
    front, flexible, tail = _places(sections, settings)
    if global_step < settings.warmup_steps:
        # The same numbers as kohya's formula, in whole numbers, so that no rounding can take a tag away.
        num_more = global_step * (len(flexible) - settings.token_warmup_min) // settings.warmup_steps
        flexible = flexible[: settings.token_warmup_min + num_more]
    # A tag's numbers depend on its place in the caption alone, not on what happens to others.
    ranks, draws = identity.generator("tags").random((2, len(parts))).tolist()
    if settings.shuffle:
        # Sorting uniform numbers needs nothing of numpy that may change; its permutation might.
        flexible.sort(key=ranks.__getitem__)
    dropped = _dropped(parts, set(flexible), draws, settings)
    chosen = _with_sentences(front, flexible, tail, sentences, settings, identity)
    return _written([parts[place].text for place in chosen if place not in dropped], settings)


def _sections(
    segments: list[Segment], groups: Sequence[Mapping[str, Any]], settings: CaptionSettings
) -> list[list[Part]]:
    """Return the parts of the caption, or those before, between and behind the keep marks."""
    separator = settings.separator.strip()
    sections = split_segments(segments, settings.keep_separator) if settings.keep_separator else [segments]
    parts = [split_parts(section, groups, separator=separator) for section in sections]
    return [*parts[:2], [part for section in parts[2:] for part in section]] if len(parts) > 1 else parts


def _kohya_sections(segments: list[Segment], settings: CaptionSettings) -> list[list[Part]]:
    """As kohya splits: empty parts stay, but for captions with a keep mark; a third mark is text."""
    text, mark = _plain(segments), settings.keep_separator
    if not mark or mark not in text:
        return [[Part(tag.strip()) for tag in text.strip().split(settings.separator)]]
    sections = [
        [Part(tag.strip()) for tag in section.split(settings.separator) if tag.strip()]
        for section in text.split(mark, 2)
    ]
    return [*sections, []][:3]


def _places(sections: Sequence[Sequence[Part]], settings: CaptionSettings) -> tuple[list[int], list[int], list[int]]:
    """Return the places of the tags kept in front, in their order, of the flexible ones, and of those kept behind."""
    parts = [part for section in sections for part in section]
    tags = [place for place, part in enumerate(parts) if part.group != SENTENCE_GROUP]
    if len(sections) == 1:
        front, flexible, tail = tags[: settings.keep_first_tags], tags[settings.keep_first_tags :], []
    else:
        middle = len(sections[0])
        end = middle + len(sections[1])
        front = [place for place in tags if place < middle]
        flexible = [place for place in tags if middle <= place < end]
        tail = [place for place in tags if place >= end]
    kept: dict[int, None] = {}
    for name in settings.keep_groups:
        kept |= dict.fromkeys(place for place in flexible if parts[place].group == name)
    if settings.never_shuffled:
        kept |= dict.fromkeys(place for place in flexible if parts[place].text in settings.never_shuffled)
    return [*front, *kept], [place for place in flexible if place not in kept], tail


def _dropped(parts: Sequence[Part], flexible: set[int], draws: Sequence[float], settings: CaptionSettings) -> set[int]:
    """Return the places of the parts to leave out. draws: a number in [0, 1) per part."""
    of_group, by_default = settings.tag_dropout_groups, settings.tag_dropout_fraction
    if not of_group:
        return {place for place in flexible if draws[place] < by_default}
    fractions = (of_group.get(part.group, by_default if place in flexible else 0) for place, part in enumerate(parts))
    return {place for place, fraction in enumerate(fractions) if draws[place] < fraction}


def _with_sentences(
    front: list[int],
    flexible: list[int],
    tail: list[int],
    sentences: list[int],
    settings: CaptionSettings,
    identity: SampleIdentity,
) -> list[int]:
    """Return the places of what is trained, in order."""
    tags = [*front, *flexible, *tail]
    if not sentences:
        return tags
    if not settings.mix:
        first_tag = min(tags, default=0)
        return [*(it for it in sentences if it < first_tag), *tags, *(it for it in sentences if it >= first_tag)]
    which_form, which_sentence = identity.generator("caption_mix").random(2).tolist()
    sentence = sentences[int(which_sentence * len(sentences))]
    forms = sorted(settings.mix)
    form = forms[_weighted([settings.mix[name] for name in forms], which_form)] if tags else "sentences"
    return {
        "tags": tags,
        "sentences": [sentence],
        "kept_sentences": [*front, *tail, sentence],
        "sentences_tags": [sentence, *tags],
        "tags_sentences": [*tags, sentence],
    }[form]


def _written(texts: Sequence[str], settings: CaptionSettings) -> str:
    if settings.compat == "kohya":
        return ", ".join(texts)
    joint = ", " if settings.separator.strip() == "," else settings.separator
    if settings.secondary_separator:
        inner = (part.strip() for text in texts for part in text.split(settings.secondary_separator))
        texts = [part for part in inner if part]
    return joint.join(texts)
