import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sharding.listing
import sharding.record
import sharding.record_pool
import sharding.scan
import sharding.sources
from sharding.images import BrokenFractionError
from sharding.listing import read_listing
from sharding.scan import scan
from sharding.schema import MANIFEST
from sharding.tables import list_parts, read_parts, schema_mismatch


@pytest.fixture
def ten_pictures(save, paint):
    for number in range(10):
        save(f"{number}.jpg", paint(number))


def rows_by_path(workspace):
    return {row["path"]: row for row in read_parts(workspace.manifest).to_pylist()}


def snapshot(folder):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in list_parts(folder)}


# --- rows ---


def test_a_file_becomes_a_row_with_all_facts(save, paint, make_config, workspace):
    save("2012/1.jpg", paint(1))
    save("2012/1.txt", "red hair, sky")

    scan(make_config(), workspace, workers=0)

    table = read_parts(workspace.manifest)
    (row,) = table.to_pylist()
    assert schema_mismatch(table, MANIFEST) == ""
    assert row["key"] == row["sha256"][:16] and len(row["sha256"]) == 64
    assert (row["width"], row["height"], row["format"], row["mode"]) == (96, 72, "jpeg", "RGB")
    assert (row["source"], row["dataset"], row["path"], row["status"]) == ("photos", "photos", "2012/1.jpg", "kept")
    assert row["tags_general"] == ["red_hair", "sky"]
    assert row["created_at"] == datetime(2012, 1, 1, tzinfo=UTC) and row["date_source"] == "path"
    assert row["is_pass_through"] and len(row["phash"]) == 32


def test_a_post_date_goes_before_exif_and_exif_before_the_path(save, paint, make_config, workspace, tmp_path):
    exif = Image.Exif()
    exif[0x0132] = "2011:02:03 04:05:06"
    for name in ("a", "b"):
        save(f"2001/{name}.jpg", paint(ord(name)), exif=exif)
    save("2001/a.json", {"created_at": "2020-01-01T00:00:00Z"})
    sources = {"posts": {"root": str(tmp_path / "raw"), "importer": "booru"}}

    scan(make_config(sources=sources), workspace, workers=0)

    rows = rows_by_path(workspace)
    assert (rows["2001/a.jpg"]["created_at"].year, rows["2001/a.jpg"]["date_source"]) == (2020, "post")
    assert (rows["2001/b.jpg"]["created_at"].year, rows["2001/b.jpg"]["date_source"]) == (2011, "exif")


def test_every_drop_has_its_reason_and_evidence(save, paint, encode, make_config, workspace, tmp_path):
    jpeg = encode(paint(1, 400, 300))
    frames = [paint(seed) for seed in (1, 2)]
    save("fine.png", paint(0))
    save("small.png", paint(1, 20, 20))
    save("wide.png", paint(2, 900, 20))
    save("large.png", paint(3, 300, 300))
    save("moving.gif", frames[0], save_all=True, append_images=frames[1:])
    save("cut.jpg", jpeg[: len(jpeg) // 2])
    save("cut_progressive.jpg", encode(paint(5, 900, 700), progressive=True)[:-3000])
    save("page.jpg", b"<html>404</html>" * 20)
    save("zero.png", b"")
    save("few.jpg", b"\xff\xd8")
    for name, post in {
        "deleted": {"is_deleted": True},
        "tagged": {"tag_string_meta": "duplicate bad_id"},
        "rated": {"rating": "e"},
        "misread": "{",
    }.items():
        save(f"{name}.png", paint(len(name)))
        save(f"{name}.json", post)
    config = make_config(
        sources={"posts": {"root": str(tmp_path / "raw"), "importer": "booru"}},
        filters={"min_pixels": 500, "max_pixels": 80_000, "min_bytes": 10, "tag_blacklist": ["duplicate"],
                 "ratings": ["general"]},
        max_broken_fraction=1.0,
    )  # fmt: skip
    save("cut.jpg", encode(paint(1, 300, 200))[:-2000])
    save("cut_progressive.jpg", encode(paint(5, 300, 200), progressive=True)[:-2000])

    report = scan(config, workspace, workers=0)

    rows = rows_by_path(workspace)
    assert {path: row["status"] for path, row in rows.items()} == {
        "fine.png": "kept", "misread.png": "kept", "small.png": "too_small", "wide.png": "extreme_aspect",
        "large.png": "too_many_pixels", "moving.gif": "animated", "cut.jpg": "undecodable",
        "cut_progressive.jpg": "undecodable", "page.jpg": "not_an_image", "zero.png": "empty_file",
        "few.jpg": "too_few_bytes", "deleted.png": "is_deleted", "tagged.png": "blacklisted_tag",
        "rated.png": "rating_not_wanted",
    }  # fmt: skip
    assert "20x20 = 400 pixels, at least 500" in rows["small.png"]["detail"]
    assert "45.00:1" in rows["wide.png"]["detail"]
    assert "meta tag duplicate" in rows["tagged.png"]["detail"]
    assert "not valid JSON" in rows["misread.png"]["detail"]
    assert all(row["detail"] for path, row in rows.items() if path != "fine.png")
    assert sum(report.status_counts.values()) == report.num_files == len(rows)


def test_a_png_cut_short_and_one_with_a_flipped_byte_are_found(save, paint, encode, make_config, workspace):
    data = encode(paint(1, 200, 200), "PNG")
    save("cut.png", data[: len(data) // 2])
    save("flipped.png", data[:2000] + bytes([data[2000] ^ 0xFF]) + data[2001:])

    scan(make_config(max_broken_fraction=1), workspace, workers=0)

    assert {row["status"] for row in rows_by_path(workspace).values()} == {"undecodable"}


def test_workers_give_the_same_bytes_as_this_process(ten_pictures, make_config, workspace):
    scan(make_config(), workspace, workers=0)
    alone = {name: data for name, (_, data) in snapshot(workspace.manifest).items()}
    for part in list_parts(workspace.manifest):
        part.unlink()

    scan(make_config(), workspace, workers=2)

    assert {name: data for name, (_, data) in snapshot(workspace.manifest).items()} == alone


def test_a_file_that_kills_its_process_costs_only_itself(ten_pictures, make_config, workspace, monkeypatch):
    class DyingPool:
        """A pool that breaks at any batch with 3.jpg, as a process killed by a decoder breaks a real one."""

        def __init__(self, workers):
            self.is_broken = False

        def submit(self, function, tasks, rules):
            from concurrent.futures import Future
            from concurrent.futures.process import BrokenProcessPool

            if self.is_broken:
                raise BrokenProcessPool
            future = Future()
            if any(task.path == "3.jpg" for task in tasks):
                self.is_broken = True
                future.set_exception(BrokenProcessPool())
            else:
                future.set_result(function(tasks, rules))
            return future

        def shutdown(self, cancel_futures):
            self.is_broken = True

    monkeypatch.setattr(sharding.record_pool, "make_pool", DyingPool)
    monkeypatch.setattr(sharding.record_pool, "_FILES_PER_BATCH", 2)

    scan(make_config(part_size=100), workspace, workers=2)

    rows = rows_by_path(workspace)
    assert list(rows) == sorted(rows) and len(rows) == 10
    assert [path for path, row in rows.items() if row["status"] != "kept"] == ["3.jpg"]
    assert rows["3.jpg"]["status"] == "undecodable" and "crashed" in rows["3.jpg"]["detail"]
    assert rows["3.jpg"]["key"]


def test_a_file_that_grows_while_it_is_read_is_read_again_then_unreadable(
    ten_pictures, make_config, workspace, monkeypatch
):  # fmt: skip
    calls = Counter()
    real = os.fstat

    def fstat(descriptor):
        status = real(descriptor)
        calls["n"] += 1
        num_bytes = status.st_size + (1 if calls["n"] <= 4 else 0)
        return type("Status", (), {"st_size": num_bytes, "st_mtime_ns": status.st_mtime_ns})

    monkeypatch.setattr(sharding.sources.os, "fstat", fstat)

    scan(make_config(), workspace, workers=0)

    rows = rows_by_path(workspace)
    assert rows["0.jpg"]["status"] == "unreadable" and "changes while" in rows["0.jpg"]["detail"]
    assert rows["1.jpg"]["status"] == "kept"


# --- parts ---


def test_a_second_scan_does_nothing(ten_pictures, make_config, workspace):
    first = scan(make_config(), workspace, workers=0)
    before = snapshot(workspace.manifest) | snapshot(workspace.listing)

    second = scan(make_config(), workspace, workers=0)

    assert (first.parts_made, second.parts_made, second.parts_current) == (3, 0, 3)
    assert second.status_counts == first.status_counts
    assert snapshot(workspace.manifest) | snapshot(workspace.listing) == before


@pytest.mark.parametrize("what", ["picture", "sidecar", "new sidecar"])
def test_what_changed_remakes_only_its_part(ten_pictures, save, paint, make_config, workspace, what):
    save("5.txt", "sky")
    scan(make_config(), workspace, workers=0)
    before = snapshot(workspace.manifest)

    if what == "picture":
        save("5.jpg", paint(77))
    elif what == "sidecar":
        save("5.txt", "sea, sky")
    else:
        save("6.jpg.txt", "moon")
    report = scan(make_config(), workspace, workers=0)

    after = snapshot(workspace.manifest)
    assert report.parts_made == 1
    assert [name for name in before if after[name] != before[name]] == ["part-00001.parquet"]


def test_settings_that_matter_remake_and_others_do_not(ten_pictures, make_config, workspace):
    scan(make_config(), workspace, workers=0)

    assert scan(make_config(plan={"seed": 3}, dedupe={"radius": 2}), workspace, workers=0).parts_made == 0
    assert scan(make_config(filters={"min_pixels": 2}), workspace, workers=0).parts_made == 3
    assert (
        scan(
            make_config(filters={"min_pixels": 2}, dedupe={"hash_size": 8, "radius": 4}), workspace, workers=0
        ).parts_made
        == 3
    )


def test_new_files_make_new_parts_and_old_parts_stay(ten_pictures, save, paint, make_config, workspace):
    scan(make_config(), workspace, workers=0)
    before = snapshot(workspace.manifest) | {f"listing {n}": v for n, v in snapshot(workspace.listing).items()}

    save("00.jpg", paint(50))
    report = scan(make_config(), workspace, workers=0)

    after = snapshot(workspace.manifest) | {f"listing {n}": v for n, v in snapshot(workspace.listing).items()}
    assert (report.num_new_files, report.parts_made) == (1, 1)
    assert {name: after[name] for name in before} == before
    assert [row[1] for row in read_listing(list_parts(workspace.listing)[-1])] == ["00.jpg"]


def test_a_file_that_is_gone_is_vanished(ten_pictures, make_config, workspace, tmp_path):
    scan(make_config(), workspace, workers=0)

    (tmp_path / "raw" / "5.jpg").unlink()
    report = scan(make_config(), workspace, workers=0)

    row = rows_by_path(workspace)["5.jpg"]
    assert (report.parts_made, row["status"], row["width"]) == (1, "vanished", 96)


def test_tasks_share_the_parts_without_gaps(ten_pictures, make_config, workspace):
    for part_index in (2, 0, 1):
        scan(make_config(part_size=2), workspace, workers=0, part_index=part_index, num_parts=3)

    assert [part.name for part in list_parts(workspace.manifest)] == [f"part-0000{n}.parquet" for n in range(5)]
    assert len(rows_by_path(workspace)) == 10


def test_a_share_outside_is_refused_before_anything_is_written(ten_pictures, make_config, workspace):
    with pytest.raises(ValueError, match="--part-index 3 is outside 0 … 2"):
        scan(make_config(), workspace, workers=0, part_index=3, num_parts=3)

    assert not workspace.root.exists()


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(ten_pictures, make_config, workspace):
    report = scan(make_config(), workspace, workers=0, dry_run=True)

    assert (report.num_new_files, report.parts_made, report.is_dry_run) == (10, 3, True)
    assert not workspace.root.exists()


def test_a_killed_scan_goes_on_where_it_was(save, paint, make_config, workspace, tmp_path):
    for number in range(40):
        save(f"{number:02d}.jpg", paint(number, 500, 400))
    program = (
        "import sys, json; from pathlib import Path; from sharding.config import *; from sharding.scan import scan;"
        "from sharding.schema import Workspace;"
        "scan(parse_config(json.loads(sys.argv[1]), DatasetConfig, name='x'), Workspace(Path(sys.argv[2])), workers=0)"
    )
    config = make_config(part_size=2)
    arguments = [sys.executable, "-c", program, config.model_dump_json(), str(workspace.root)]

    process = subprocess.Popen(arguments, cwd=Path(sharding.scan.__file__).parents[1])
    deadline = time.monotonic() + 30
    while len(list_parts(workspace.manifest)) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left_over = workspace.manifest / "part-00019.parquet.partial-1"
    left_over.write_bytes(b"half a part")
    os.utime(left_over, (1e9, 1e9))
    done_before = snapshot(workspace.manifest)
    report = scan(config, workspace, workers=0)

    assert 3 <= report.parts_current < 20 and report.parts_current + report.parts_made == 20
    assert {n: v for n, v in snapshot(workspace.manifest).items() if n in done_before} == done_before
    assert len(rows_by_path(workspace)) == 40
    assert not left_over.exists()


def test_a_damaged_part_is_made_again(ten_pictures, make_config, workspace):
    scan(make_config(), workspace, workers=0)
    part = list_parts(workspace.manifest)[1]
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])

    report = scan(make_config(), workspace, workers=0)

    assert report.parts_made == 1 and part.read_bytes() == whole


# --- too much is broken ---


def test_too_many_broken_files_are_an_error_after_all_is_written(ten_pictures, save, paint, make_config, workspace):
    for number in range(11):
        save(f"ok{number}.jpg", paint(number + 20))
    for number in range(3):
        save(f"bad{number}.jpg", b"nothing" * number)
    config = make_config(max_broken_fraction=0.1)

    for _ in range(2):  # the verdict is the same when nothing is left to do
        with pytest.raises(BrokenFractionError, match=r"3 of 24 files are broken \(2 not_an_image, 1 empty_file\)"):
            scan(config, workspace, workers=0)

    assert len(rows_by_path(workspace)) == 24
    assert scan(make_config(max_broken_fraction=0.2), workspace, workers=0).parts_made == 0


def test_a_handful_of_files_is_never_too_broken(save, make_config, workspace):
    save("bad.jpg", b"")

    assert scan(make_config(), workspace, workers=0).status_counts == {"empty_file": 1}


# --- the listing ---


def test_a_missing_root_is_named_before_anything_is_written(make_config, workspace, tmp_path):
    sources = {"photos": {"root": str(tmp_path / "raw")}, "posts": {"root": str(tmp_path / "nowhere")}}

    with pytest.raises(FileNotFoundError, match=r"sources\.posts\.root: .*nowhere"):
        scan(make_config(sources=sources), workspace, workers=0)

    assert not workspace.root.exists()


def test_names_that_are_not_utf8_and_unreadable_folders_are_reported(
    save, paint, make_config, workspace, tmp_path, monkeypatch
):  # fmt: skip
    save("fine.jpg", paint(1))
    save("locked/1.jpg", paint(2))
    (tmp_path / "raw" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"x")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(sharding.listing.os, "scandir", scandir)

    report = scan(make_config(), workspace, workers=0)

    assert report.status_counts == {"kept": 1}
    assert report.problems == (
        r"photos/caf\xe9.jpg: not_utf8_name: the name is not UTF-8: rename it",
        "photos/locked: unreadable_folder: Permission denied",
    )
    events = [json.loads(line) for line in workspace.events.read_text().splitlines()]
    assert [event["event"] for event in events].count("not_listed") == 2


def test_a_source_that_left_the_config_is_an_error_that_names_it(ten_pictures, make_config, workspace, tmp_path):
    scan(make_config(), workspace, workers=0)
    config = make_config(sources={"other": {"root": str(tmp_path)}})

    with pytest.raises(ValueError, match=r"sources\.photos: .*no longer"):
        scan(config, workspace, workers=0)


def test_a_file_is_read_and_decoded_once(ten_pictures, make_config, workspace, monkeypatch):
    calls = Counter()
    decode, read = sharding.record.decode_rgb, sharding.record._read
    monkeypatch.setattr(sharding.record, "decode_rgb", lambda *a, **k: calls.update(["decode"]) or decode(*a, **k))
    monkeypatch.setattr(sharding.record, "_read", lambda task: calls.update(["read"]) or read(task))

    scan(make_config(), workspace, workers=0)

    assert calls == {"decode": 10, "read": 10}
    assert np.unique([row["key"] for row in rows_by_path(workspace).values()]).size == 10


def test_the_report_is_frozen(ten_pictures, make_config, workspace):
    report = scan(make_config(), workspace, workers=0)

    assert replace(report, num_files=3).num_files == 3
    with pytest.raises(AttributeError):
        report.num_files = 3
