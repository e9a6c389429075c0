"""Find a file of a source in the manifest by the path that a person has at hand.

That may be absolute, relative to the current directory, relative to the source's root, or SOURCE/PATH as the reports
write it. For a path that is nowhere the nearest ones are named.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharding.config import DatasetConfig
from sharding.reporting.questions import Questions, quoted, rows_of
from sharding.schema import LISTING, MANIFEST, Workspace
from sharding.tables import list_parts

_NUM_NEAREST = 3


@dataclass(frozen=True)
class FoundFile:
    """A file of a source. record: its manifest row, None when it is listed and not scanned yet."""

    source: str
    path: str
    record: dict[str, Any] | None

    @property
    def key(self) -> str:
        """Its key, or "" when it could not be read or has not been scanned."""
        return str(self.record["key"] or "") if self.record is not None else ""


def find_file(questions: Questions, config: DatasetConfig, workspace: Workspace, text: str) -> list[FoundFile]:
    """Return the files that `text` names: several when sources have files of the same relative path.

    Raises ValueError, naming the nearest paths, when there is none.
    """
    wanted = " or ".join(
        f"(path = {quoted(path)}" + (f" and source = {quoted(source)})" if source else ")")
        for source, path in _places(config, text)
    )
    records = questions.ask(f"select * from {rows_of(list_parts(workspace.manifest), MANIFEST)} where {wanted}")
    found = {(row["source"], row["path"]): row for row in records}
    listed = questions.ask(f"select source, path from {rows_of(list_parts(workspace.listing), LISTING)} where {wanted}")
    names = sorted({*found, *((row["source"], row["path"]) for row in listed)})
    if not names:
        raise ValueError(_not_found(questions, config, workspace, text))
    return [FoundFile(source, path, found.get((source, path))) for source, path in names]


def _places(config: DatasetConfig, text: str) -> Iterator[tuple[str, str]]:
    """Yield (source or "", path below its root) for everything that `text` may mean."""
    yield "", Path(text).as_posix()
    # Not resolved: a link inside a source is listed under its own name.
    absolute = Path(os.path.normpath(Path.cwd() / text))
    for name, source in config.sources.items():
        root = Path(os.path.normpath(Path.cwd() / source.root))
        if absolute != root and absolute.is_relative_to(root):
            yield name, absolute.relative_to(root).as_posix()
        if text.startswith(f"{name}/"):
            yield name, text.removeprefix(f"{name}/")


def _not_found(questions: Questions, config: DatasetConfig, workspace: Workspace, text: str) -> str:
    name = quoted(Path(text).name)
    parts = list_parts(workspace.listing)
    files = rows_of(parts, LISTING) if parts else rows_of(list_parts(workspace.manifest), MANIFEST)
    rows = questions.ask(
        f"select source, path from {files} order by levenshtein(parse_filename(path), {name}), source, path "
        f"limit {_NUM_NEAREST}"
    )
    nearest = ", ".join(f"{row['source']}/{row['path']}" for row in rows)
    roots = ", ".join(str(source.root) for source in config.sources.values())
    hint = f"the nearest: {nearest}" if nearest else "nothing is listed; run `python -m sharding scan` first"
    return f"{text!r}: no such file in the sources ({roots}); {hint}"
