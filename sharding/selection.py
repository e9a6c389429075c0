"""Choose kept pictures by a condition over everything that is known about them: `decide DECISION --where "SQL"`.

The condition is DuckDB's SQL over one row per kept picture:

    key, dataset, source, path, num_bytes, format, width, height, mode, has_alpha, is_animated, created_at, date_source,
    rating, custom and tags_general … tags_meta     as in the manifest, tags in underscore form, merged by dedupe
    score_<model>                                   of annotations/<model>, null where it has none; - and . become _
    caption_<policy>                                the text of captions/<policy>

For example `score_quality < 0.2 and list_contains(tags_general, 'comic')`. Decides nothing and writes nothing.
"""

import re
from pathlib import Path

import pyarrow as pa

from sharding.reporting.questions import Questions, rows_of
from sharding.schema import MANIFEST, Workspace
from sharding.tables import list_parts, read_part

_KEPT_COLUMNS = tuple(
    name
    for name in MANIFEST.names
    if name not in ("sha256", "phash", "turned_phashes", "sketch", "local_features", "status", "detail")
)


class SelectionError(ValueError):
    """A condition is not SQL or names a column that is not there; the message lists the columns."""


def select_keys(workspace: Workspace, condition: str) -> pa.Array:
    """Return the kept keys for which `condition` is true, sorted.

    Raises FileNotFoundError without kept parts, SelectionError.
    """
    import duckdb

    kept = list_parts(workspace.kept)
    if not kept:
        raise FileNotFoundError(f"{workspace.kept}: no parts; run `python -m sharding dedupe` first")
    further = _further_columns(workspace)
    joins = [
        f'left join (select key, any_value({value}) as "{name}" from {rows_of(parts, MANIFEST)} group by key) '
        "using (key)"
        for name, (value, parts) in further.items()
    ]
    view = f"(select {', '.join(_KEPT_COLUMNS)} from {rows_of(kept, MANIFEST)}) {' '.join(joins)}"
    with Questions() as questions:
        try:
            rows = questions.ask(f"select key from (select * from {view}) where ({condition}\n) order by key")
        except duckdb.Error as error:
            problem = str(error).split("\n")[0]
            raise SelectionError(
                f"--where {condition!r}: {problem}; columns: {', '.join([*_KEPT_COLUMNS, *further])}"
            ) from None
    return pa.array([row["key"] for row in rows], pa.string())


def _further_columns(workspace: Workspace) -> dict[str, tuple[str, list[Path]]]:
    """Return, by the name in the view, a column of another table and the table's parts."""
    columns = {}
    for folder, column, prefix in (("annotations", "score", "score_"), ("captions", "text", "caption_")):
        for table in sorted(path for path in (workspace.root / folder).glob("*") if path.is_dir()):
            parts = list_parts(table)
            if parts and column in read_part(parts[0]).column_names:
                columns[prefix + re.sub(r"\W", "_", table.name)] = (column, parts)
    return columns
