import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sharding.listing import extend_listing, find_images, listing_table, read_listing
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
