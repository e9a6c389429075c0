"""Judge a file by the filters of the config: what speaks against it, under the rule's name.

Pure. Which files are broken is not decided here (`images`), nor what people have decided (`decisions`).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from sharding.config import FilterConfig
from sharding.images import ImageFacts
from sharding.metadata import Metadata

RULES = frozenset({
    "extension_not_wanted", "too_few_bytes", "too_many_bytes", "format_not_wanted", "animated", "too_small",
    "oversize", "extreme_aspect", "is_deleted", "is_banned", "is_flagged", "is_pending", "blacklisted_tag",
    "blacklisted_meta_substring", "rating_not_wanted", "low_score", "low_fav_count",
})  # fmt: skip
"""All that this module may object; a person's decision `keep` overrides these and no other."""


@dataclass(frozen=True)
class Objection:
    """reason: the name of the rule. detail: the evidence."""

    reason: str
    detail: str


def objection_to_file(path: str, num_bytes: int, metadata: Metadata, filters: FilterConfig) -> Objection | None:
    """Return what speaks against a file before its header is read."""
    ending = PurePosixPath(path).suffix.lower()
    if filters.extensions and ending not in filters.extensions:
        return Objection(reason="extension_not_wanted", detail=f"{ending}; wanted: {', '.join(filters.extensions)}")
    if 0 < num_bytes < filters.min_bytes and not _is_exempt(metadata, filters):
        return Objection(reason="too_few_bytes", detail=f"{num_bytes:,} bytes, at least {filters.min_bytes:,} wanted")
    if filters.max_bytes is not None and num_bytes > filters.max_bytes:
        return Objection(reason="too_many_bytes", detail=f"{num_bytes:,} bytes, at most {filters.max_bytes:,} wanted")
    return None


def objection_to_picture(
    facts: ImageFacts, num_bytes: int, metadata: Metadata, filters: FilterConfig
) -> Objection | None:
    """Return what speaks against a picture by its header."""
    width, height = facts.width, facts.height
    pixels = f"{width}x{height} = {width * height:,} pixels"
    if filters.formats and facts.format not in filters.formats:
        return Objection(reason="format_not_wanted", detail=f"{facts.format}; wanted: {', '.join(filters.formats)}")
    if facts.is_animated and filters.animated == "drop":
        return Objection(reason="animated", detail=f"an animated {facts.format}")
    if width * height < filters.min_pixels and not _is_exempt(metadata, filters):
        return Objection(reason="too_small", detail=f"{pixels}, at least {filters.min_pixels:,} wanted")
    if filters.oversize is not None and num_bytes > filters.oversize[0] and width * height > filters.oversize[1]:
        limits = f"more than {filters.oversize[0]:,} bytes and {filters.oversize[1]:,} pixels"
        return Objection(reason="oversize", detail=f"{num_bytes:,} bytes and {pixels}: {limits}")
    aspect = max(width, height) / min(width, height)
    if aspect > filters.max_aspect:
        detail = f"{width}x{height} is {aspect:.2f}:1, at most {filters.max_aspect:g}:1"
        return Objection(reason="extreme_aspect", detail=detail)
    return None


def objection_to_post(metadata: Metadata, filters: FilterConfig) -> Objection | None:
    """Return what speaks against a picture by what its source says. What a source does not say never does."""
    for flag in filters.drop_flags:
        if flag in metadata.flags:
            return Objection(reason=flag, detail="set in the post")
    if objection := _objection_to_tags(metadata.tags, filters):
        return objection
    if filters.ratings and metadata.rating and metadata.rating not in filters.ratings:
        detail = f"{metadata.rating}; wanted: {', '.join(filters.ratings)}"
        return Objection(reason="rating_not_wanted", detail=detail)
    score, favourites = _number(metadata, "score"), _number(metadata, "fav_count")
    if filters.min_score is not None and score is not None and score < filters.min_score:
        return Objection(reason="low_score", detail=f"score {score}, at least {filters.min_score} wanted")
    if filters.min_fav_count is not None and favourites is not None and favourites < filters.min_fav_count:
        detail = f"{favourites} favourites, at least {filters.min_fav_count} wanted"
        return Objection(reason="low_fav_count", detail=detail)
    return None


def _objection_to_tags(tags: Mapping[str, Collection[str]], filters: FilterConfig) -> Objection | None:
    unwanted = set(filters.tag_blacklist)
    for category, of_category in tags.items():
        if found := [tag for tag in of_category if tag in unwanted]:
            return Objection(reason="blacklisted_tag", detail=f"{category} tag {', '.join(found)}")
    for tag in tags.get("meta", ()):
        if parts := [part for part in filters.meta_blacklist_substrings if part in tag]:
            return Objection(reason="blacklisted_meta_substring", detail=f"meta tag {tag} contains {parts[0]!r}")
    return None


def _is_exempt(metadata: Metadata, filters: FilterConfig) -> bool:
    return any(tag in filters.exempt_tags for tags in metadata.tags.values() for tag in tags)


def _number(metadata: Metadata, name: str) -> int | None:
    try:
        return int(metadata.custom.get(name, ""))
    except ValueError:
        return None
