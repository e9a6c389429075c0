"""Parts: Parquet files that remember what they were made from.

A part is finished when it exists *and* the digest in its metadata equals today's digest of what it would be
made from (input part, configuration that matters, model and revision). Otherwise it is made again.
This module writes, reads and lists parts; questions across parts go through DuckDB (`query`).
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sharding.files import replacing

MADE_FROM = b"chunkline.made_from"
_PREFIX = b"chunkline."


class DamagedPartError(ValueError):
    """A part cannot be read as Parquet, or lacks its digest."""


def part_name(index: int) -> str:
    """Return the file name of part `index`: `part-00012.parquet`."""
    return f"part-{index:05d}.parquet"


def list_parts(folder: Path) -> list[Path]:
    """Return the finished parts of `folder` in order; an absent folder has none."""
    return sorted(folder.glob("part-*.parquet")) if folder.is_dir() else []


def owned_parts(parts: Sequence[Path], part_index: int, num_parts: int) -> list[Path]:
    """Return the parts that task `part_index` of `num_parts` owns: every num_parts-th, starting with its own.

    Raises ValueError if part_index is outside 0 … num_parts - 1; nothing is guessed from a scheduler.
    """
    if num_parts < 1 or not 0 <= part_index < num_parts:
        raise ValueError(f"--part-index {part_index} is outside 0 … {num_parts - 1}: check --num-parts {num_parts}")
    return list(parts[part_index::num_parts])


def write_part(path: Path, table: pa.Table, *, made_from: str, metadata: Mapping[str, str] | None = None) -> None:
    """Write `table` as a part, whole or not at all.

    made_from: digest of everything the rows depend on; `is_current` compares it.
    metadata: further facts for readers (model, revision, licence), stored as `chunkline.<name>`.
    Same table and metadata, same bytes.
    """
    own = {MADE_FROM: made_from.encode()}
    own.update({_PREFIX + name.encode(): value.encode() for name, value in sorted((metadata or {}).items())})
    table = table.replace_schema_metadata(own)
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", row_group_size=64_000, use_dictionary=True)


def part_metadata(path: Path) -> dict[str, str]:
    """Return the facts stored with a part, `made_from` among them. Raises DamagedPartError, FileNotFoundError."""
    try:
        raw = pq.read_schema(path).metadata or {}
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise DamagedPartError(f"{path}: not a readable part ({error}); delete it and run the stage again") from error
    return {
        name.removeprefix(_PREFIX).decode(): value.decode() for name, value in raw.items() if name.startswith(_PREFIX)
    }


def is_current(path: Path, made_from: str) -> bool:
    """Tell whether the part exists, is readable and was made from exactly what `made_from` says."""
    try:
        return part_metadata(path).get("made_from") == made_from
    except (FileNotFoundError, DamagedPartError):
        return False


def read_part(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a part, or only some of its columns. Raises FileNotFoundError, DamagedPartError."""
    try:
        return pq.read_table(path, columns=list(columns) if columns is not None else None, partitioning=None)
    except FileNotFoundError:
        raise
    except (pa.ArrowInvalid, OSError) as error:
        raise DamagedPartError(f"{path}: not a readable part ({error}); delete it and run the stage again") from error


def read_parts(folder: Path, columns: Sequence[str] | None = None, *, schema: pa.Schema | None = None) -> pa.Table:
    """Read all parts of a folder as one table, in part order.

    schema: what an empty folder gives, restricted to `columns`; without it an empty folder is FileNotFoundError.
    """
    parts = list_parts(folder)
    if parts:
        return pa.concat_tables([read_part(part, columns) for part in parts])
    if schema is None:
        raise FileNotFoundError(f"{folder}: no parts; run the stage that writes them first")
    names = columns if columns is not None else schema.names
    return pa.schema([schema.field(name) for name in names]).empty_table()


def iterate_rows(table: pa.Table, batch_size: int = 8_000) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table as dictionaries, converting `batch_size` at a time to bound memory."""
    for batch in table.to_batches(max_chunksize=batch_size):
        yield from batch.to_pylist()


def query(sql: str, *, memory_limit_mb: int = 1_500) -> pa.Table:
    """Answer a question across parts with DuckDB: `query("select … from 'ws/manifest/*.parquet'")`.

    Beyond the memory limit DuckDB spills to disk, so memory does not grow with the data.
    """
    import duckdb

    with duckdb.connect() as connection:
        connection.execute(f"set memory_limit='{memory_limit_mb}MB'; set preserve_insertion_order=true")
        return connection.sql(sql).to_arrow_table()


def schema_mismatch(table: pa.Table, schema: pa.Schema) -> str:
    """Return one sentence saying how `table` differs from `schema`, or "" when the columns agree."""
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        return f"columns {', '.join(missing)} are missing"
    for field in schema:
        if table.schema.field(field.name).type != field.type:
            return f"column {field.name} is {table.schema.field(field.name).type}, expected {field.type}"
    return ""
