"""Pixiv: one folder per artist, named as the artist is displayed.

`custom.artist_name` is the first folder below the root, kept as it is. Tags are `pixiv_tags` (else `tags`) of a JSON
sidecar, else a txt sidecar's. Without a translation they are general, in whatever language they were given. With
`tag_dict` they are put into Danbooru's words, and what has no use there is left out: tags that stay non-ASCII, the
"1000+ bookmarks" behind a name, and what nearly every picture is called. `tag_categories` files them.
"""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from sharding.metadata.base import (
    Metadata,
    SidecarError,
    parse_post_date,
    read_json_sidecar,
    underscore_tags,
    with_text_tags,
)
from sharding.metadata.tables import NO_TABLES, Tables, read_table

_CATEGORIES = {0: "general", 3: "copyright", 4: "character", 5: "meta"}
_SAYS_NOTHING = frozenset(
    ("girl", "boy", "oc", "original", "original_character", "illustration", "derivative_work", "r-18")
)


def read_metadata(root: Path, path: PurePosixPath, tables: Tables = NO_TABLES) -> Metadata:
    """Read artist, tags and date of a picture. A sidecar that cannot be used is a problem, not an error."""
    custom = {"artist_name": path.parts[0]} if len(path.parts) > 1 else {}
    problems = [] if custom else ["not in an artist's folder"]
    try:
        post = read_json_sidecar(root, path) or {}
    except SidecarError as error:
        problems.append(str(error))
        post = {}
    listed = post.get("pixiv_tags", post.get("tags", []))
    tags: dict[str, tuple[str, ...]] = {}
    if not isinstance(listed, list) or not all(isinstance(tag, str) for tag in listed):
        problems.append("pixiv_tags is not a list of strings")
    elif tables.tag_dict is not None or tables.tag_categories is not None:
        translation = read_table(tables.tag_dict) if tables.tag_dict is not None else {}
        categories = read_table(tables.tag_categories) if tables.tag_categories is not None else {}
        tags = translate(listed, translation, categories)
    elif listed:
        tags = {"general": underscore_tags(listed)}
    dates = (parse_post_date(post.get(field)) for field in ("created_at", "create_date", "date"))
    created_at = next(filter(None, dates), None)
    metadata = Metadata(
        tags=tags,
        created_at=created_at,
        date_source="post" if created_at else "",
        custom=custom,
        problem="; ".join(problems),
    )
    return with_text_tags(metadata, root, path)


def translate(
    tags: list[str], translation: Mapping[str, Any], categories: Mapping[str, Any]
) -> dict[str, tuple[str, ...]]:
    """Return Pixiv's tags in Danbooru's words by category; an unknown category is general.

    A tag is looked up as given, then in underscore form. Left out, case ignored: non-ASCII ones after that, those
    that say nothing; of `NAME_1000+_bookmarks` the name stays.
    """
    found: dict[str, list[str]] = {}
    for tag in tags:
        words = translation.get(tag, translation.get("_".join(tag.split()), tag))
        for name in underscore_tags([words] if isinstance(words, str) else []):
            if name.endswith("+_bookmarks"):
                name = name.rsplit("_", 2)[0] if name.count("_") > 1 else ""
            if name and name.isascii() and name.lower() not in _SAYS_NOTHING:
                category = categories.get(name)
                found.setdefault(_CATEGORIES.get(category if isinstance(category, int) else 0, "general"), []).append(
                    name
                )
    return {category: tuple(dict.fromkeys(names)) for category, names in found.items()}
