"""Ask the rules of captions: how many tags, which, in what order; and what tags tell about the pictures."""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from training.dreambooth.doctor.captions import Caption
from training.dreambooth.doctor.names import pieces_of
from training.dreambooth.doctor.patients import Notes, Patient
from training.dreambooth.doctor.pictures import Picture
from training.dreambooth.doctor.rules import Words
from training.dreambooth.doctor.style_checks import is_style

_SEVERAL = re.compile(r"(\d+)\+?(?:girl|boy|other)s?")
_MULTIPLE = re.compile(r"multiple (?:girls|boys|others)")
_MIN_TAGGED = 4  # pictures: shares of fewer say nothing


def check_captions(patient: Patient, notes: Notes) -> None:
    """Judge each caption of a concept, then all of them together."""
    name = first_tag(patient)
    tagged = []
    for picture in patient.pictures:
        if picture.caption is None:
            missing = float(patient.needs_captions)
            notes.ask("caption_missing", missing, patient.name, "has no caption", file=picture.path)
            continue
        _check_form(patient, picture, picture.caption, notes)
        if picture.caption.tags:
            _check_tags(patient, picture, picture.caption, notes, name=name)
            tagged.append(picture.caption.tags)
    if len(tagged) >= _MIN_TAGGED:
        _check_shares(patient, tagged, notes)


def first_tag(patient: Patient) -> str:
    """Return the tag that stands first in most captions; empty when no caption has tags."""
    firsts = Counter(one.caption.tags[0] for one in patient.pictures if one.caption and one.caption.tags)
    return firsts.most_common(1)[0][0] if firsts else ""


def num_characters(tags: Sequence[str]) -> int:
    """Return how many figures tags tell of: "2girls" and "1boy" are 3; "multiple girls" at least 2; 0: not said."""
    counted = sum(int(match[1]) for tag in tags if (match := _SEVERAL.fullmatch(tag)))
    return max(counted, 2 * any(_MULTIPLE.fullmatch(tag) for tag in tags))


def redundant_tags(tags: Sequence[str]) -> list[tuple[str, str]]:
    """Return (tag, tag that says it, too): all words of the first one are in the second one."""
    words = {tag: set(tag.split()) for tag in tags}
    return [(tag, other) for tag in tags for other in tags if words[tag] < words[other]]


def order_inversions(tags: Sequence[str], words: Words) -> list[tuple[str, str]]:
    """Return neighbours that stand the wrong way round: clothing, face, action, direction, camera."""
    groups = [(tag, rank) for tag in tags if (rank := _rank(tag, words)) is not None]
    return [(one, two) for (one, rank), (two, next_rank) in pairwise(groups) if rank > next_rank]


def _rank(tag: str, words: Words) -> int | None:
    if tag.split()[-1] in words.clothing:
        return 0
    for rank, group in enumerate((words.face, words.action, words.direction, words.camera), start=1):
        if tag in group:
            return rank
    return None


def _check_form(patient: Patient, picture: Picture, caption: Caption, notes: Notes) -> None:
    text = "is not UTF-8"
    notes.ask("caption_undecodable", float(not caption.is_decodable), patient.name, text, file=picture.path)
    is_empty = not caption.tags
    notes.ask("caption_missing", float(is_empty), patient.name, "has an empty caption", file=picture.path)
    faults = () if is_empty else caption.faults
    notes.ask("caption_form", len(faults), patient.name, f"its caption {', '.join(faults)}", file=picture.path)


def _check_tags(patient: Patient, picture: Picture, caption: Caption, notes: Notes, *, name: str) -> None:
    words, tags = notes.rules.words, caption.tags
    generic = [tag for tag in tags if tag in words.generic]
    redundant = redundant_tags(tags)
    inversions = order_inversions(tags, words)
    sided = [tag for tag in tags if {"left", "right"} & set(tag.split())]
    written = [tag for tag in tags if tag in words.text]
    covered = [tag for tag in tags if tag in words.covered]
    bad = [tag for tag in tags if tag in words.bad]
    characters = num_characters(tags)
    side_rule = "left_right_flipped" if notes.rules.training.flip else "left_right"
    num_pieces = len(pieces_of(caption.text))
    for rule, number, text in (
        ("tag_count", len(tags), f"{len(tags)} tags"),
        ("token_count", num_pieces, f"{num_pieces} tokens{_cut_off(caption, notes)}"),
        (
            "first_tag",
            float(tags[0] != name and not is_style(patient, notes.rules)),
            f"begins with {tags[0]!r}, most with {name!r}",
        ),
        ("tag_order", len(inversions), ", ".join(f"{one!r} stands before {two!r}" for one, two in inversions)),
        ("generic_tag", len(generic), f"generic: {', '.join(generic)}"),
        ("redundant_tag", len(redundant), ", ".join(f"{one!r} is in {two!r}" for one, two in redundant)),
        (side_rule, len(sided), f"says {', '.join(sided)}"),
        ("face_covered", len(covered), f"tagged {', '.join(covered)}"),
        ("bad_tag", len(bad), f"tagged {', '.join(bad)}"),
        ("text_tag", len(written), f"tagged {', '.join(written)}"),
        ("characters", characters, f"tags tell of {characters} figures"),
    ):
        notes.ask(rule, number, patient.name, text, file=picture.path)


def _cut_off(caption: Caption, notes: Notes) -> str:
    """Return which tags come after the last token that is read; nothing when all are."""
    limit = notes.rules.rules["token_count"].fail or len(caption.text)
    used, lost = 0, []
    for tag in caption.tags:
        used += len(pieces_of(tag)) + 1  # and its comma
        if used - 1 > limit:
            lost.append(tag)
    return f"; cut off: {', '.join(lost)}" if lost else ""


def _check_shares(patient: Patient, tagged: Sequence[Sequence[str]], notes: Notes) -> None:
    words = notes.rules.words
    total = len(tagged)
    counts = Counter(tag for tags in tagged for tag in tags)
    for tag, count in sorted(counts.items()):
        if tag.split()[-1] in words.defaults and len(tag.split()) > 1 and not is_style(patient, notes.rules):
            notes.ask("default_tag", count / total, patient.name, f"{tag!r} is in {count} of {total} captions")
    close = sum(any(tag in words.close_up for tag in tags) for tags in tagged)
    whole = sum(any(tag in words.full_body for tag in tags) for tags in tagged)
    notes.ask("close_ups", close / total, patient.name, f"{close} of {total} are close-ups, by their tags")
    if close + whole:  # else framing is not tagged at all
        notes.ask("full_body", whole / total, patient.name, f"{whole} of {total} show the whole figure")
    for tag in words.face:
        text = f"{counts[tag]} of {total} are {tag!r}"
        notes.ask("one_expression", counts[tag] / total, patient.name, text)
    for tag in (*words.camera, *words.direction):
        notes.ask("one_angle", counts[tag] / total, patient.name, f"{counts[tag]} of {total} are {tag!r}")
