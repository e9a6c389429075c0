import pyarrow as pa
import pytest

from sharding.tables import (
    DamagedPartError,
    is_current,
    iterate_rows,
    list_parts,
    owned_parts,
    part_metadata,
    part_name,
    query,
    read_part,
    read_parts,
    schema_mismatch,
    write_part,
)

TABLE = pa.table({"key": ["a", "b", "c"], "n": [1, 2, 3]})


def test_a_part_remembers_what_it_was_made_from(tmp_path):
    path = tmp_path / part_name(12)

    write_part(path, TABLE, made_from="digest", metadata={"model": "wd"})

    assert path.name == "part-00012.parquet"
    assert part_metadata(path) == {"made_from": "digest", "model": "wd"}
    assert is_current(path, "digest") and not is_current(path, "other")
    assert read_part(path, ["n"]).to_pydict() == {"n": [1, 2, 3]}


def test_the_same_table_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_part(
            tmp_path / name,
            TABLE,
            made_from="x",
            metadata={"z": "1", "y": "2"} if name == "a" else {"y": "2", "z": "1"},
        )

    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_damaged_and_absent_parts_are_not_current(tmp_path):
    path = tmp_path / part_name(0)
    assert not is_current(path, "x")
    write_part(path, TABLE, made_from="x")

    path.write_bytes(path.read_bytes()[:-20])

    assert not is_current(path, "x")
    for call in (read_part, part_metadata):
        with pytest.raises(DamagedPartError, match="delete it and run the stage again"):
            call(path)
    with pytest.raises(FileNotFoundError):
        read_part(tmp_path / part_name(1))


def test_parts_are_listed_in_order_without_temporaries(tmp_path):
    for number in (10, 2):
        write_part(tmp_path / part_name(number), TABLE, made_from="x")
    (tmp_path / f"{part_name(3)}.partial-77").write_bytes(b"")

    assert [path.name for path in list_parts(tmp_path)] == [part_name(2), part_name(10)]
    assert list_parts(tmp_path / "absent") == []
    assert read_parts(tmp_path, ["n"]).num_rows == 6


def test_an_empty_folder_gives_an_empty_table_or_an_error(tmp_path):
    assert read_parts(tmp_path, ["n"], schema=TABLE.schema).schema.names == ["n"]
    with pytest.raises(FileNotFoundError, match="no parts; run the stage"):
        read_parts(tmp_path)


@pytest.mark.parametrize("num_parts", [1, 2, 3, 7])
def test_every_part_is_owned_by_exactly_one_task(tmp_path, num_parts):
    parts = [tmp_path / part_name(number) for number in range(5)]

    owned = [part for task in range(num_parts) for part in owned_parts(parts, task, num_parts)]

    assert sorted(owned) == parts


@pytest.mark.parametrize(("part_index", "num_parts"), [(3, 3), (-1, 3), (0, 0)])
def test_a_share_outside_is_refused(part_index, num_parts):
    with pytest.raises(ValueError, match=f"--part-index {part_index}"):
        owned_parts([], part_index, num_parts)


def test_rows_are_converted_in_batches():
    assert list(iterate_rows(TABLE, batch_size=2)) == TABLE.to_pylist()


def test_duckdb_answers_across_parts(tmp_path):
    for number in range(2):
        write_part(tmp_path / part_name(number), TABLE, made_from="x")

    answer = query(f"select key, sum(n) as n from '{tmp_path}/*.parquet' group by key order by key")

    assert answer.to_pydict() == {"key": ["a", "b", "c"], "n": [2, 4, 6]}


def test_a_schema_mismatch_is_one_sentence():
    schema = pa.schema([("key", pa.string()), ("n", pa.int64())])

    assert schema_mismatch(TABLE, schema) == ""
    assert schema_mismatch(TABLE.drop_columns(["n"]), schema) == "columns n are missing"
    assert (
        schema_mismatch(TABLE.set_column(1, "n", pa.array(["x"] * 3)), schema) == "column n is string, expected int64"
    )
