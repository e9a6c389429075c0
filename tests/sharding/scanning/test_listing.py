import io
import tarfile
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sharding.scanning.listing import extend_listing, listing_table, read_listing, unlisted
from sharding.scanning.walk import find_images
from sharding.schema import LISTING
from sharding.tables import list_parts, read_parts


def listed(found):
    return list(zip(found.rows["source"].to_pylist(), found.rows["path"].to_pylist(), strict=True))


def test_links_are_followed_to_files_once_and_never_to_folders(save, paint, tmp_path):
    save("a/1.jpg", paint(1))
    outside = tmp_path / "outside.jpg"
    paint(2).save(outside)
    root = tmp_path / "raw"
    (root / "again.jpg").symlink_to(root / "a" / "1.jpg")
    (root / "b.jpg").symlink_to(outside)
    (root / "c.jpg").symlink_to(outside)
    (root / "lost.jpg").symlink_to(root / "nothing")
    (root / "self.jpg").symlink_to(root / "self.jpg")
    (root / "a" / "loop").symlink_to(root)

    found = find_images({"photos": root})

    assert listed(found) == [("photos", "a/1.jpg"), ("photos", "b.jpg")]
    assert found.num_linked_files == 2
    assert sorted((p.path, p.reason) for p in found.problems) == [
        ("lost.jpg", "dangling_link"), ("self.jpg", "dangling_link"),
    ]  # fmt: skip


def test_only_pictures_are_listed_sorted_and_others_are_counted(save, tmp_path):
    for name in ("b/2.PNG", "b/10.jpg", "a.webp", "a.txt", "a.json", "a.mp4", "noending"):
        save(name, b"x")

    found = find_images({"z": tmp_path / "raw", "y": tmp_path / "raw" / "b"})

    assert listed(found) == [
        ("y", "10.jpg"), ("y", "2.PNG"), ("z", "a.webp"), ("z", "b/10.jpg"), ("z", "b/2.PNG"),
    ]  # fmt: skip
    assert found.num_other_files == 2


def test_tasks_that_freeze_at_once_list_every_file_exactly_once(workspace):
    rows = [("photos", f"{number:03d}.jpg", 1) for number in range(200)]
    start = threading.Barrier(8)

    def freeze(number):
        start.wait()
        # each task has seen another state of the folders
        return extend_listing(workspace.listing, listing_table(rows[: 200 - 10 * number]), 7)

    with ThreadPoolExecutor(8) as pool:
        added = list(pool.map(freeze, range(8)))

    paths = read_parts(workspace.listing, schema=LISTING).column("path").to_pylist()
    assert sorted(paths) == [row[1] for row in rows]
    assert sum(added) == 200


def test_a_part_that_a_growing_folder_does_not_show_is_not_passed_over(workspace, monkeypatch):
    rows = [("photos", f"{number}.jpg", 1) for number in range(4)]
    extend_listing(workspace.listing, listing_table(rows[:3]), 1)
    real = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [p for p in real(self, pattern) if "00001" not in p.name])

    assert extend_listing(workspace.listing, listing_table(rows), 1) == 1

    monkeypatch.undo()
    assert [read_listing(part) for part in list_parts(workspace.listing)] == [[row] for row in rows]


def test_tars_are_looked_into_only_where_the_source_says_so(save, tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("1.jpg", "1.json", "1.txt", "1.mask.png", "1.cls", "../out.jpg"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    save("set/0.TAR", buffer.getvalue())
    save("set/bad.tar", b"nothing")

    closed = find_images({"x": tmp_path / "raw"})
    opened = find_images({"x": tmp_path / "raw"}, with_tars=["x"])

    assert listed(closed) == [] and closed.num_other_files == 2
    assert listed(opened) == [("x", "set/0.TAR/1.jpg")] and opened.num_other_files == 2
    assert [(p.path, p.reason) for p in opened.problems] == [
        ("set/0.TAR/../out.jpg", "unsafe_name"), ("set/bad.tar", "damaged_tar"),
    ]  # fmt: skip


def test_the_same_path_in_two_sources_is_two_files(workspace):
    rows = [("a", "1.jpg", 1), ("b", "1.jpg", 2)]
    extend_listing(workspace.listing, listing_table(rows[:1]), 8)

    assert unlisted(listing_table(rows), workspace.listing).to_pylist() == [
        {"source": "b", "path": "1.jpg", "num_bytes": 2}
    ]
    assert extend_listing(workspace.listing, listing_table(rows), 8) == 1
    assert extend_listing(workspace.listing, listing_table(rows), 8) == 0


def test_many_files_are_listed_without_a_python_object_each(workspace):
    numbers = np.arange(100_000)
    names = pc.binary_join_element_wise("folder/", pa.array(numbers.astype("U")), ".jpg", "").cast(pa.large_string())
    rows = pa.table({"source": pa.repeat("s", 100_000), "path": names, "num_bytes": numbers})

    tracemalloc.start()
    assert extend_listing(workspace.listing, rows.slice(0, 99_990), 2_000) == 99_990
    assert extend_listing(workspace.listing, rows, 2_000) == 10
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak_bytes < 3_000_000  # of one part; as tuples and strings all would be 20 MB
    assert read_listing(list_parts(workspace.listing)[-1])[0] == ("s", "folder/99990.jpg", 99_990)
