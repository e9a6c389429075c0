"""Tars of webdataset and img2dataset, and chunks of our own: members of one key lie in the same tar.

KEY.json is a flat object. Tags are the `tags_*` lists of our own chunks, Danbooru's fields where it has them, else
the txt's; a `caption` becomes `custom.caption`, for a policy to use, and then the txt, which repeats it, is not read
as tags. How members are found and read is `sources`' work.
"""

from pathlib import Path, PurePosixPath
from typing import Any

from sharding.metadata import booru
from sharding.metadata.base import Metadata
from sharding.metadata.tables import NO_TABLES, Tables
from sharding.schema import TAG_CATEGORIES

_OWN = ("artist_name", "vn_name", "vn_short")


def read_metadata(root: Path, path: PurePosixPath, tables: Tables = NO_TABLES) -> Metadata:
    """Read JSON and txt of a picture's key. A JSON that cannot be used is a problem, not an error."""
    return booru.read_post(root, path, to_danbooru, needs_post=False)


def to_danbooru(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the object in Danbooru's fields."""
    post = dict(facts)
    for category in TAG_CATEGORIES:
        if isinstance(tags := facts.get(f"tags_{category}"), list):
            post[f"tag_string_{category}"] = tags
    own = {name: facts[name] for name in _OWN if facts.get(name)}
    own |= {name.removeprefix("custom_"): value for name, value in facts.items() if name.startswith("custom_")}
    return post | {"custom": own | ({"caption": facts["caption"]} if facts.get("caption") else {})}
