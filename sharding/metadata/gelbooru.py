"""Gelbooru and its relatives: the post's JSON lies beside the picture, in the fields of their API.

`tags` is one string, all general, unless the downloader has added `tags_general`, `tags_artist` and so on (strings or
lists). Put into Danbooru's fields and read by `booru`, which also reads a post that already has those.
"""

import html
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from sharding.metadata import booru
from sharding.metadata.base import Metadata
from sharding.metadata.tables import NO_TABLES, Tables
from sharding.schema import TAG_CATEGORIES

_DATE = "%a %b %d %H:%M:%S %z %Y"
"""Sat Nov 13 12:34:56 -0600 2021"""
_RATINGS = {"safe": "general"}
"""Of the years before `sensitive` existed."""


def read_metadata(root: Path, path: PurePosixPath, tables: Tables = NO_TABLES) -> Metadata:
    """Read the post beside a picture. No post, or one that cannot be used, is a problem, not an error."""
    return booru.read_post(root, path, to_danbooru)


def to_danbooru(post: dict[str, Any]) -> dict[str, Any]:
    """Return the post in Danbooru's fields; one that has them already as it is."""
    inner = post.get("post")
    if isinstance(inner, list) and len(inner) == 1:
        inner = inner[0]
    if isinstance(inner, dict):
        post = inner
    if "tag_string" in post or "tag_string_general" in post:
        return post
    names = {category: f"tags_{category}" for category in TAG_CATEGORIES} | {"meta": "tags_metadata"}
    by_category = {category: post[name] for category, name in names.items() if name in post}
    if not by_category:
        by_category = {"general": post.get("tags", "")}
    return post | {
        **{f"tag_string_{category}": _unescape(tags) for category, tags in by_category.items()},
        "created_at": _iso_date(post.get("created_at")),
        "rating": _RATINGS.get(str(post.get("rating")), post.get("rating")),
        **{f"is_{state}": True for state in ("deleted", "flagged", "pending") if post.get("status") == state},
    }


def _unescape(tags: Any) -> Any:
    """Gelbooru writes `'` as an HTML entity."""
    if isinstance(tags, str):
        return html.unescape(tags)
    return [html.unescape(tag) if isinstance(tag, str) else tag for tag in tags] if isinstance(tags, list) else tags


def _iso_date(value: Any) -> Any:
    try:
        return datetime.strptime(value, _DATE).astimezone(UTC).isoformat()
    except (TypeError, ValueError, OverflowError):
        return value  # in another form, which `booru` may know
