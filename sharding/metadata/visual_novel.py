"""Visual novels: one folder per game, named `Full Name (abc)`.

`custom.vn_name` and `custom.vn_short` come from the first folder below the root; tags from txt sidecars.
"""

import re
from pathlib import Path, PurePosixPath

from sharding.metadata.base import Metadata, with_text_tags
from sharding.metadata.tables import NO_TABLES, Tables

_FOLDER = re.compile(r"(?P<name>.*\S)[\s_]+\((?P<short>[^()]+)\)")


def read_metadata(root: Path, path: PurePosixPath, tables: Tables = NO_TABLES) -> Metadata:
    """Read the novel's names and the tags of a picture."""
    match = _FOLDER.fullmatch(path.parts[0]) if len(path.parts) > 1 else None
    if match is None:
        return with_text_tags(Metadata(problem="not in a folder named 'Full Name (abc)'"), root, path)
    custom = {"vn_name": match["name"].rstrip("_"), "vn_short": match["short"].strip()}
    return with_text_tags(Metadata(custom=custom), root, path)
