"""kohya's sd-scripts: one `in_json` for a folder, {image: {"caption": …, "tags": …}}.

Images are named by an absolute path, a path below the folder, or a bare stem, as the two branches of kohya write
them. Tags (a string with commas, or a list) are general; the caption is `custom.caption`, for a policy to use.
"""

from pathlib import Path, PurePosixPath

from sharding.metadata.base import Metadata, comma_tags, underscore_tags, with_text_tags
from sharding.metadata.tables import NO_TABLES, Tables, read_entries


def read_metadata(root: Path, path: PurePosixPath, tables: Tables = NO_TABLES) -> Metadata:
    """Read the entry of a picture. None, or one that cannot be used, is a problem, not an error."""
    entry = read_entries(tables.metadata).find(root, path) if tables.metadata is not None else None
    if entry is None:
        return with_text_tags(Metadata(problem="no entry in the in_json"), root, path)
    if not isinstance(entry, dict):
        return with_text_tags(Metadata(problem=f"its in_json entry is a {type(entry).__name__}"), root, path)
    problems = []
    tags, caption = entry.get("tags", ""), entry.get("caption", "")
    if isinstance(tags, list) and all(isinstance(tag, str) for tag in tags):
        general = underscore_tags(tags)
    elif isinstance(tags, str):
        general = comma_tags(tags)
    else:
        general = ()
        problems.append(f"tags is a {type(tags).__name__}")
    if not isinstance(caption, str):
        problems.append(f"caption is a {type(caption).__name__}")
        caption = ""
    metadata = Metadata(
        tags={"general": general} if general else {},
        custom={"caption": " ".join(caption.split())} if caption.strip() else {},
        problem="; ".join(problems),
    )
    return metadata if caption else with_text_tags(metadata, root, path)
