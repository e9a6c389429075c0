"""Ask many questions of a workspace's tables over one DuckDB connection, in bounded memory.

Writes the FROM clauses, so that a table without parts is an empty table with the right columns. Beyond its memory
limit DuckDB spills to the system's temporary folder, never to the workspace. A single question: `tables.query`.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa

MEMORY_LIMIT_MB = 2_000


class Questions:
    """A connection for one report; use it in a `with`. Answers are small: rows become dictionaries."""

    def __init__(self, *, memory_limit_mb: int = MEMORY_LIMIT_MB) -> None:
        import duckdb

        self._spill = tempfile.TemporaryDirectory(prefix="chunkline-")
        self._connection = duckdb.connect(
            config={
                "memory_limit": f"{memory_limit_mb}MB",
                "temp_directory": self._spill.name,
                "preserve_insertion_order": False,
            }
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        self._spill.cleanup()

    def ask(self, sql: str) -> list[dict[str, Any]]:
        """Return the rows of the answer. Raises duckdb.Error for a mistake in the question."""
        rows: list[dict[str, Any]] = self._connection.sql(sql).to_arrow_table().to_pylist()
        return rows

    def ask_one(self, sql: str) -> dict[str, Any]:
        """Return the only row of an aggregate."""
        [row] = self.ask(sql)
        return row

    def run(self, sql: str) -> None:
        """Run a statement without an answer, such as `create temp table`."""
        self._connection.execute(sql)


def rows_of(parts: Sequence[Path], schema: pa.Schema, *, extra: str = "") -> str:
    """Return what stands after FROM for some Parquet files; for none, an empty table with the schema's columns.

    extra: further arguments of read_parquet, for example `filename = true`.
    """
    if parts:
        options = ", ".join(filter(None, ("hive_partitioning = false", extra)))
        return f"read_parquet([{', '.join(quoted(part) for part in parts)}], {options})"
    columns = ", ".join(f'null::{_sql_type(field.type)} as "{field.name}"' for field in schema)
    return f"(select {columns} where false)"


def quoted(value: object) -> str:
    """Return a value as an SQL string."""
    return "'" + str(value).replace("'", "''") + "'"


def _sql_type(arrow_type: pa.DataType) -> str:
    if pa.types.is_struct(arrow_type):
        return "struct(" + ", ".join(f'"{field.name}" {_sql_type(field.type)}' for field in arrow_type) + ")"
    if pa.types.is_list(arrow_type):
        return f"{_sql_type(arrow_type.value_type)}[]"
    names = {
        pa.int64(): "bigint", pa.int32(): "integer", pa.bool_(): "boolean", pa.float32(): "float", pa.binary(): "blob",
    }  # fmt: skip
    return names.get(arrow_type, "varchar")
