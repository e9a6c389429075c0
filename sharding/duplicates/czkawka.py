"""Write the duplicate groups in the result form of czkawka, for the tools that read it.

JSON as its `--pretty-file-to-save`: a list of groups, each a list of {path, size, width, height, modified_date,
difference}, the keeper first. CSV: the same, a row per file. The files are those of the groups in the manifest; nothing
is looked at again but the time of each file.
"""

import csv
import io
import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from sharding.config import DatasetConfig
from sharding.files import write_bytes
from sharding.reporting.questions import Questions, rows_of
from sharding.schema import DROPS, GROUPS, MANIFEST, Workspace
from sharding.tables import list_parts

COLUMNS = ("path", "size", "width", "height", "modified_date", "difference")


def export_czkawka(config: DatasetConfig, workspace: Workspace, target: Path) -> tuple[int, int]:
    """Write all groups to `target`, as JSON or CSV by its ending, and return (groups, files).

    Raises ValueError for another ending, FileNotFoundError before dedupe has run.
    """
    if target.suffix not in (".json", ".csv"):
        raise ValueError(f"{target}: must end in .json or .csv")
    groups = list(read_groups(config, workspace))
    if target.suffix == ".json":
        write_bytes(target, (json.dumps(groups, indent=2, ensure_ascii=False) + "\n").encode())
    else:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("group", *COLUMNS))
        writer.writerows(
            (number, *(file[column] for column in COLUMNS)) for number, files in enumerate(groups) for file in files
        )
        write_bytes(target, text.getvalue().encode())
    return len(groups), sum(len(files) for files in groups)


def read_groups(config: DatasetConfig, workspace: Workspace) -> Iterator[list[dict[str, Any]]]:
    """Yield each duplicate group as czkawka would write it, the keeper first.

    difference: bits to the keeper; 0 for a crop, which has none. modified_date: seconds; 0 when the file is gone.
    """
    if not list_parts(workspace.dedupe / "groups"):
        raise FileNotFoundError(f"{workspace.dedupe / 'groups'}: no parts; run `python -m sharding dedupe` first")
    with Questions() as questions:
        rows = questions.ask(
            f"""
            select "group", manifest.source, manifest.path, num_bytes, width, height, drops.distance
            from (
                select "group", key, bool_or(is_keeper) as is_keeper
                from {rows_of(list_parts(workspace.dedupe / "groups"), GROUPS)} group by "group", key) as groups
            join {rows_of(list_parts(workspace.manifest), MANIFEST)} as manifest
                on manifest.key = groups.key and status = 'kept'
            left join {rows_of(list_parts(workspace.dedupe / "drops"), DROPS)} as drops
                on manifest.source = drops.source and manifest.path = drops.path
            order by "group", is_keeper desc, drops.path is not null, manifest.source, manifest.path
            """
        )
    for _, files in groupby(rows, key=lambda row: row["group"]):
        yield [_entry(config, file) for file in files]


def _entry(config: DatasetConfig, file: dict[str, Any]) -> dict[str, Any]:
    place = (
        config.sources[file["source"]].root / file["path"] if file["source"] in config.sources else Path(file["path"])
    )
    return {
        "path": str(place.absolute()),
        "size": file["num_bytes"],
        "width": file["width"],
        "height": file["height"],
        "modified_date": int(place.stat().st_mtime) if place.is_file() else 0,
        "difference": file["distance"] or 0,
    }
