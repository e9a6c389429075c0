"""Visual novels: one folder per game, named `Full Name (abc)`.

`custom.vn_name` and `custom.vn_short` come from the first folder below the root; tags from txt sidecars.
"""

import re
from pathlib import Path, PurePosixPath

from sharding.metadata.base import Metadata, text_sidecar_tags

_FOLDER = re.compile(r"(?P<name>.*\S)[\s_]+\((?P<short>[^()]+)\)")


def read_metadata(root: Path, path: PurePosixPath) -> Metadata:
    """Read the novel's names and the tags of a picture."""
    tags, problem = text_sidecar_tags(root, path)
    problems = [problem] if problem else []
    custom = {}
    match = _FOLDER.fullmatch(path.parts[0]) if len(path.parts) > 1 else None
    if match:
        custom = {"vn_name": match["name"].rstrip("_"), "vn_short": match["short"].strip()}
    else:
        problems.append("not in a folder named 'Full Name (abc)'")
    return Metadata(tags=tags, custom=custom, problem="; ".join(problems))
