"""A booru: the post's JSON lies beside the picture, in Danbooru's fields.

Reads tag_string_{general,character,copyright,artist,meta} (space separated), rating, created_at, the flags, and
passes id, score, fav_count, md5 and source on as `custom`. Importers of other sites map their fields to these and
hand their mapping to `read_post`. Without a post, or one without tags, a txt sidecar's tags are taken.
"""

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from sharding.metadata.base import Metadata, SidecarError, parse_post_date, read_json_sidecar, with_text_tags
from sharding.metadata.tables import NO_TABLES, Tables
from sharding.schema import RATINGS, TAG_CATEGORIES

_RATING_LETTERS = {"g": "general", "s": "sensitive", "q": "questionable", "e": "explicit"}
_FLAGS = ("is_deleted", "is_banned", "is_flagged", "is_pending")
_CUSTOM = ("id", "score", "fav_count", "md5", "source")
_SITE_PREFIX = "anime_pictures_"
"""A second site's own fields, which its importer or its downloader has put under this."""


def read_metadata(root: Path, path: PurePosixPath, tables: Tables = NO_TABLES) -> Metadata:
    """Read the post beside a picture. No post, or one that cannot be used, is a problem, not an error."""
    return read_post(root, path, lambda post: post)


def read_post(
    root: Path, path: PurePosixPath, to_danbooru: Callable[[dict[str, Any]], dict[str, Any]], *, needs_post: bool = True
) -> Metadata:
    """Read the JSON beside a picture after `to_danbooru` has put it into Danbooru's fields.

    needs_post: a picture without one has a problem.
    """
    try:
        post = read_json_sidecar(root, path)
    except SidecarError as error:
        return with_text_tags(Metadata(problem=str(error)), root, path)
    if post is None:
        problem = "no post JSON beside the picture" if needs_post else ""
        return with_text_tags(Metadata(problem=problem), root, path)
    metadata = metadata_of_post(to_danbooru(post))
    return metadata if "caption" in metadata.custom else with_text_tags(metadata, root, path)


def metadata_of_post(post: dict[str, Any]) -> Metadata:
    """Translate one post; each field that has an unexpected value is left out and named in `problem`."""
    problems = []
    tags = {}
    for category in TAG_CATEGORIES:
        field = f"tag_string_{category}"
        value = post.get(field, post.get("tag_string", "") if category == "general" else "")
        if isinstance(value, list) and all(isinstance(tag, str) for tag in value):
            value = " ".join(value)
        if not isinstance(value, str):
            problems.append(f"{field} is a {type(value).__name__}")
        elif value.split():
            tags[category] = tuple(dict.fromkeys(value.split()))
    letter = post.get("rating")
    rating = _RATING_LETTERS.get(letter, letter) if isinstance(letter, str) else ""
    if rating not in RATINGS:
        problems += [f"rating {letter!r} is unknown"] if letter else []
        rating = ""
    created_at = parse_post_date(post.get("created_at"))
    own = post.get("custom")
    custom = _texts({name: value for name, value in post.items() if name in _CUSTOM or name.startswith(_SITE_PREFIX)})
    custom |= _texts(own) if isinstance(own, dict) else {}
    return Metadata(
        tags=tags,
        rating=rating,
        created_at=created_at,
        date_source="post" if created_at else "",
        custom=custom,
        flags=frozenset(flag for flag in _FLAGS if post.get(flag) is True),
        problem="; ".join(problems),
    )


def _texts(values: dict[str, Any]) -> dict[str, str]:
    """Return the numbers and texts among `values`, as one line of text each."""
    plain = {name: " ".join(str(value).split()) for name, value in values.items() if _is_plain(value)}
    return {name: text for name, text in plain.items() if text}


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)
