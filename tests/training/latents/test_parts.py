import numpy as np
import pytest

from sharding.files import TEMPORARY_MARK
from training.latents.parts import LatentsError, PartWriter, problems_of, read_info, read_rows

SHAPES = {"a": (2, 3, 4), "b": (2, 4, 3), "c": (2, 1, 1)}


def values_of(name):
    return np.full(SHAPES[name], ord(name), np.float32)


def write(folder, *, broken="c", number=3):
    with PartWriter(folder, number, dtype="fp32") as writer:
        for name, shape in SHAPES.items():
            writer.add(
                {"id": name}, [memoryview(values_of(name)).cast("B")], [shape], "bad: x" if name == broken else ""
            )
        return writer.commit()


def test_values_lie_where_the_index_says_and_can_be_mapped(tmp_path):
    info = write(tmp_path)

    found, rows = read_rows(tmp_path, 3)

    assert found == info
    assert (info.num_rows, info.num_broken) == (3, 1)
    data = np.memmap(tmp_path / info.data.name, np.float32, "r")
    assert len(data) == 48
    for row in rows[:2]:
        (shape,) = row["shapes"]
        start = row["offset"] // 4
        assert np.array_equal(data[start : start + row["num_bytes"] // 4].reshape(shape), values_of(row["id"]))
    assert (rows[2]["num_bytes"], rows[2]["reason"], rows[2]["shapes"]) == (0, "bad: x", [[2, 1, 1]])


def test_the_same_values_give_the_same_bytes(tmp_path):
    write(tmp_path / "one")
    write(tmp_path / "two")

    names = sorted(path.name for path in (tmp_path / "one").glob("part-*"))
    assert names == ["part-00003.bin", "part-00003.json", "part-00003.parquet"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_without_a_commit_nothing_stays(tmp_path):
    with pytest.raises(RuntimeError), PartWriter(tmp_path, 0, dtype="fp32") as writer:
        writer.add({"id": "a"}, [memoryview(b"1234")], [(1,)])
        assert any(TEMPORARY_MARK in path.name for path in tmp_path.iterdir())
        raise RuntimeError

    assert list(tmp_path.iterdir()) == []
    assert read_info(tmp_path, 0) is None


def test_a_part_that_another_task_has_made_meanwhile_stays_as_it_is(tmp_path):
    with PartWriter(tmp_path, 0, dtype="fp32") as late:
        late.add({"id": "a"}, [memoryview(b"late")], [(1,)])
        with PartWriter(tmp_path, 0, dtype="fp32") as early:
            early.add({"id": "a"}, [memoryview(b"soon")], [(1,)])
            first = early.commit()

        assert late.commit() == first

    assert (tmp_path / "part-00000.bin").read_bytes() == b"soon"
    assert problems_of(tmp_path, 0, with_data=True) == []


@pytest.mark.parametrize("suffix", [".bin", ".parquet", ".json"])
@pytest.mark.parametrize("damage", ["missing", "cut short", "other bytes"])
def test_damage_is_found_and_names_the_file(tmp_path, suffix, damage):
    write(tmp_path)
    path = tmp_path / f"part-00003{suffix}"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-10] if damage == "cut short" else content[:20] + b"?" + content[21:])

    problems = problems_of(tmp_path, 3, with_data=True)

    assert len(problems) == 1
    assert path.name in problems[0]
    is_seen_by_readers = not (suffix == ".bin" and damage == "other bytes")
    assert bool(problems_of(tmp_path, 3, with_data=False)) == is_seen_by_readers
    if is_seen_by_readers:
        with pytest.raises(LatentsError, match=r"part-00003"):
            read_rows(tmp_path, 3)


def test_a_manifest_of_another_format_is_refused(tmp_path):
    write(tmp_path)
    path = tmp_path / "part-00003.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 9'))

    with pytest.raises(LatentsError, match="format 9, this program reads 1"):
        read_info(tmp_path, 3)
