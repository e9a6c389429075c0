"""Pixiv: one folder per artist, named as the artist is displayed.

`custom.artist_name` is the first folder below the root, kept as it is. Tags come from a txt sidecar, or from
`pixiv_tags` (else `tags`) of a JSON sidecar; they are general, in whatever language they were given.
"""

from pathlib import Path, PurePosixPath

from sharding.metadata.base import (
    Metadata,
    SidecarError,
    parse_post_date,
    read_json_sidecar,
    text_sidecar_tags,
    underscore_tags,
)


def read_metadata(root: Path, path: PurePosixPath) -> Metadata:
    """Read artist, tags and date of a picture. A sidecar that cannot be used is a problem, not an error."""
    custom = {"artist_name": path.parts[0]} if len(path.parts) > 1 else {}
    tags, problem = text_sidecar_tags(root, path)
    created_at = None
    problems = [problem] if problem else []
    try:
        post = read_json_sidecar(root, path) or {}
    except SidecarError as error:
        problems.append(str(error))
        post = {}
    listed = post.get("pixiv_tags", post.get("tags", []))
    if not isinstance(listed, list) or not all(isinstance(tag, str) for tag in listed):
        problems.append("pixiv_tags is not a list of strings")
    elif not tags and listed:
        tags = {"general": underscore_tags(listed)}
    for field in ("created_at", "create_date", "date"):
        created_at = created_at or parse_post_date(post.get(field))
    if not custom:
        problems.append("not in an artist's folder")
    return Metadata(
        tags=tags,
        created_at=created_at,
        date_source="post" if created_at else "",
        custom=custom,
        problem="; ".join(problems),
    )
