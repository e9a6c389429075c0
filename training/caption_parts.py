"""A caption's text taken apart into tags, each with its group. Pure, no torch.

What a caption's groups know stays in one piece: a tag with a comma in it, a whole sentence. Nothing is left out but
empty parts, and no choice of wildcards is cut.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from training.wildcards import Segment, expand

if TYPE_CHECKING:
    import pyarrow as pa


class Part(NamedTuple):
    """One tag, or the sentences of a captioner."""

    text: str
    group: str = ""
    """Empty when no group has it."""


def split_parts(segments: Sequence[Segment], groups: Sequence[Mapping[str, Any]], *, separator: str) -> list[Part]:
    """Return the parts in their order, stripped, without empty ones.

    groups: the caption's {group, tags}; a tag in two groups belongs to the first. separator: without spaces around it.
    """
    group_of = {tag.strip(): entry["group"] for entry in reversed(groups) for tag in entry["tags"]}
    long_tags = _long_tags(group_of, separator, has_choices=any(segment.is_choice for segment in segments))
    raws, texts = _pieces(segments, separator)
    parts: list[Part] = []
    position = 0
    while position < len(raws):
        for pieces, tag in long_tags.get(raws[position], ()):
            end = position + len(pieces)
            if raws[position:end] == pieces:
                text = tag if texts[position:end] == pieces else f"{separator} ".join(texts[position:end])
                parts.append(Part(text, group_of[tag]))
                break
        else:
            end = position + 1
            parts += _short_parts(texts[position], group_of.get(raws[position], ""), separator)
        position = end
    return parts


def split_segments(segments: Sequence[Segment], mark: str) -> list[list[Segment]]:
    """Split at every `mark` that is not inside a choice. mark: holds no brace."""
    sections: list[list[Segment]] = [[]]
    for segment in segments:
        if segment.is_choice or mark not in segment.raw:
            sections[-1].append(segment)
            continue
        # Escapes make {{ to {, so a mark without braces stands equally often in both.
        first, *others = zip(segment.raw.split(mark), segment.text.split(mark), strict=True)
        sections[-1].append(Segment(*first, False))
        sections += [[Segment(*other, False)] for other in others]
    return sections


def known_groups(index: "pa.Table") -> set[str]:
    """Return the groups in which captions of a chunk's index have tags."""
    import pyarrow.compute as pc

    groups = pc.list_flatten(index.column("groups"))
    has_tags = pc.greater(pc.list_value_length(pc.struct_field(groups, "tags")), 0)
    return set(pc.unique(pc.struct_field(groups.filter(has_tags), "group")).to_pylist())


def _pieces(segments: Sequence[Segment], separator: str) -> tuple[list[str], list[str]]:
    """Return what stands between separators, stripped: as written, and as trained."""
    raws, texts = [""], [""]
    for segment in segments:
        for found, text in ((raws, segment.raw), (texts, segment.text)):
            first, *others = [text] if segment.is_choice else text.split(separator)
            found[-1] += first
            found += others
    return [raw.strip() for raw in raws], [text.strip() for text in texts]


def _long_tags(tags: Iterable[str], separator: str, *, has_choices: bool) -> dict[str, list[tuple[list[str], str]]]:
    """Return the tags with a separator inside as (pieces, tag), the longest first, by their first piece."""
    found: dict[str, list[tuple[list[str], str]]] = {}
    for tag in tags:
        if separator in tag:
            segments = expand(tag, draw=lambda: 0.0) if has_choices else [Segment(tag, tag, False)]
            pieces = _pieces(segments, separator)[0]
            found.setdefault(pieces[0], []).append((pieces, tag))
    for same_start in found.values():
        same_start.sort(key=lambda it: -len(it[0]))
    return found


def _short_parts(text: str, group: str, separator: str) -> list[Part]:
    """Return the parts of one piece: several when a choice that no group knows gave several tags."""
    if not text:
        return []
    if group or separator not in text:
        return [Part(text, group)]
    return [Part(tag) for tag in map(str.strip, text.split(separator)) if tag]
