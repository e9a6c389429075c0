"""A booru: the post's JSON lies beside the picture, in Danbooru's fields.

Reads tag_string_{general,character,copyright,artist,meta} (space separated), rating, created_at, the flags, and
passes id, score, fav_count, md5 and source on as `custom`. Other sites' fields are to be mapped before.
"""

from pathlib import Path, PurePosixPath
from typing import Any

from sharding.metadata.base import Metadata, SidecarError, parse_post_date, read_json_sidecar
from sharding.schema import RATINGS, TAG_CATEGORIES

_RATING_LETTERS = {"g": "general", "s": "sensitive", "q": "questionable", "e": "explicit"}
_FLAGS = ("is_deleted", "is_banned", "is_flagged")
_CUSTOM = ("id", "score", "fav_count", "md5", "source")


def read_metadata(root: Path, path: PurePosixPath) -> Metadata:
    """Read the post beside a picture. No post, or one that cannot be used, is a problem, not an error."""
    try:
        post = read_json_sidecar(root, path)
    except SidecarError as error:
        return Metadata(problem=str(error))
    if post is None:
        return Metadata(problem="no post JSON beside the picture")
    return metadata_of_post(post)


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
    custom = {
        name: str(post[name])
        for name in _CUSTOM
        if isinstance(post.get(name), str | int) and not isinstance(post[name], bool) and post[name] != ""
    }
    return Metadata(
        tags=tags,
        rating=rating,
        created_at=created_at,
        date_source="post" if created_at else "",
        custom=custom,
        flags=frozenset(flag for flag in _FLAGS if post.get(flag) is True),
        problem="; ".join(problems),
    )
