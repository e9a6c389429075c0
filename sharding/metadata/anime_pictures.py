"""Anime-Pictures: the post's JSON lies beside the picture, as the site's API gives it.

{"post": {id, md5, score_number, datetime, …}, "tags": [{"tag": {"tag", "type"}, "relation": {"removetime"}}]}, or the
same flat. Put into Danbooru's fields and read by `booru`, which also reads a post that already has those. The site's
other fields become `custom` under `anime_pictures_`. It has no ratings of Danbooru's kind.
"""

from pathlib import Path, PurePosixPath
from typing import Any

from sharding.metadata import booru
from sharding.metadata.base import Metadata
from sharding.metadata.tables import NO_TABLES, Tables

_CATEGORIES = {1: "character", 4: "artist", 2: "general", 7: "general", 3: "copyright", 5: "copyright", 6: "copyright"}
_RENAMED = {
    "width": "image_width", "height": "image_height", "size": "file_size", "score_number": "score",
    "datetime": "created_at",
}  # fmt: skip
_KEPT = ("id", "md5")
_PREFIX = "anime_pictures_"


def read_metadata(root: Path, path: PurePosixPath, tables: Tables = NO_TABLES) -> Metadata:
    """Read the post beside a picture. No post, or one that cannot be used, is a problem, not an error."""
    return booru.read_post(root, path, to_danbooru)


def to_danbooru(document: dict[str, Any]) -> dict[str, Any]:
    """Return the post in Danbooru's fields; one that has them already as it is."""
    if any(name.startswith("tag_string") for name in document):
        return document
    inner = document.get("post")
    facts = inner if isinstance(inner, dict) else document
    post: dict[str, Any] = {}
    for name, value in facts.items():
        if name not in ("post", "tags") and isinstance(value, str | int | float):
            post[_RENAMED.get(name, name if name in _KEPT else f"{_PREFIX}{name}")] = value
    tags = document.get("tags", facts.get("tags", []))
    if not isinstance(tags, list):
        return post | {"tag_string_general": tags}  # `booru` says what is wrong with it
    for category, names in sort_tags(tags).items():
        post[f"tag_string_{category}"] = names
    return post


def sort_tags(tags: list[Any]) -> dict[str, list[str]]:
    """Return the tags in Danbooru's words by category, without those that were removed from the post.

    Types 1 character, 4 artist, 2 and 7 general, 3, 5 and 6 copyright, others meta. "girl" is 1girl; "2 girls" is
    2girls, and takes back a 1girl before it.
    """
    found: dict[str, list[str]] = {}
    for item in tags:
        tag = item.get("tag") if isinstance(item, dict) else None
        tag, relation = (tag, item.get("relation")) if isinstance(tag, dict) else (item, None)
        if not isinstance(tag, dict) or not isinstance(tag.get("tag"), str):
            continue
        if any(isinstance(place, dict) and place.get("removetime") for place in (item, tag, relation)):
            continue
        number = tag.get("type")
        category = _CATEGORIES.get(number, "meta") if isinstance(number, int) else "meta"
        name = {"girl": "1girl", "2 girls": "2girls"}.get(tag["tag"], "_".join(tag["tag"].split()))
        if name == "2girls":
            found = {of: [other for other in names if other != "1girl"] for of, names in found.items()}
        found.setdefault(category, []).append(name)
    return found
