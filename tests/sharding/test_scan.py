import errno
import hashlib
import io
import json
import os
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

import sharding.files
import sharding.scan
import sharding.scanning.manifest_part
import sharding.scanning.record_pool
import sharding.scanning.walk
import sharding.sources
from captioning.decode import ImageTask, prepare_image
from sharding.images import BrokenFractionError, ImageError
from sharding.packing.shard import _read_source
from sharding.scan import scan
from sharding.scanning import record as record_module
from sharding.scanning.listing import read_listing
from sharding.scanning.takeover import stamps_path
from sharding.schema import DECISIONS, MANIFEST, Workspace
from sharding.tables import list_parts, part_name, read_parts, schema_mismatch, write_part


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

    monkeypatch.setattr(sharding.scanning.record_pool, "make_pool", DyingPool)
    monkeypatch.setattr(sharding.scanning.record_pool, "_FILES_PER_BATCH", 2)

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


# --- what has changed since ---


@pytest.fixture
def work(monkeypatch):
    """Count the files that are read and the pictures that are decoded."""
    calls = Counter()
    decode, read = record_module.decode_grey, record_module.read_file
    monkeypatch.setattr(record_module, "decode_grey", lambda *a, **k: calls.update(["decoded"]) or decode(*a, **k))
    monkeypatch.setattr(record_module, "read_file", lambda *a, **k: calls.update(["read"]) or read(*a, **k))
    return calls


def events(workspace, *names):
    lines = [json.loads(line) for line in workspace.events.read_text().splitlines()]
    return [line for line in lines if line["event"] in names]


def manifest_bytes(workspace):
    return {path.name: path.read_bytes() for path in list_parts(workspace.manifest)}


@pytest.mark.parametrize("change", ["other bytes", "touched", "sidecar", "all at once"])
def test_only_what_has_changed_is_read_and_the_bytes_are_those_of_a_fresh_scan(
    ten_pictures, save, paint, make_config, workspace, tmp_path, work, change
):  # fmt: skip
    config = make_config(part_size=100)
    save("5.txt", "sky")
    scan(config, workspace, workers=0)
    work.clear()

    if change in ("other bytes", "all at once"):
        save("3.jpg", paint(77))
    if change in ("touched", "all at once"):
        os.utime(tmp_path / "raw" / "4.jpg")
    if change in ("sidecar", "all at once"):
        save("5.txt", "sea, sky")
    report = scan(config, workspace, workers=0)

    num_read = 3 if change == "all at once" else 1
    num_decoded = int(change in ("other bytes", "all at once"))
    assert (work["read"], work["decoded"]) == (num_read, num_decoded)
    assert (report.changes["read"], report.changes["taken_over"]) == (num_read, 10 - num_read)
    assert report.changes["changed"] == num_decoded
    fresh = Workspace(tmp_path / "fresh")
    scan(config, fresh, workers=0)
    assert manifest_bytes(workspace) == manifest_bytes(fresh)


def test_a_changed_filter_reads_again_but_decodes_only_what_it_lets_in(ten_pictures, make_config, workspace, work):
    scan(make_config(filters={"min_pixels": 10_000}), workspace, workers=0)
    assert work["decoded"] == 0  # 96 x 72 is too small
    scan(make_config(filters={"min_pixels": 1}), workspace, workers=0)
    work.clear()

    scan(make_config(filters={"min_pixels": 2}), workspace, workers=0)

    assert (work["read"], work["decoded"]) == (10, 0)
    scan(make_config(filters={"min_pixels": 2}, dedupe={"hash_size": 8}), workspace, workers=0)
    assert work["decoded"] == 10


def test_moved_vanished_changed_and_returned_are_told_apart_by_content(
    ten_pictures, save, paint, make_config, workspace, tmp_path, work
):  # fmt: skip
    raw = tmp_path / "raw"
    scan(make_config(), workspace, workers=0)
    keys = {path: row["key"] for path, row in rows_by_path(workspace).items()}
    gone = (raw / "2.jpg").read_bytes()
    work.clear()

    (raw / "sub").mkdir()
    (raw / "1.jpg").rename(raw / "sub" / "other name.jpg")
    (raw / "2.jpg").unlink()
    save("3.jpg", paint(333))
    save("new.jpg", paint(444))
    first = scan(make_config(), workspace, workers=0)

    counts = {name: first.changes[name] for name in ("new", "changed", "moved", "vanished", "returned")}
    assert counts == {"new": 1, "changed": 1, "moved": 1, "vanished": 1, "returned": 0}
    assert "1 new, 1 changed, 1 moved, 1 vanished; 5 files read, 1 not read again" in first.summary()
    assert work["decoded"] == 2  # the changed and the new one; not the moved one
    (moved,) = events(workspace, "moved")
    assert (moved["before"], moved["path"], moved["key"]) == ("photos/1.jpg", "sub/other name.jpg", keys["1.jpg"])
    (changed,) = events(workspace, "changed")
    assert (changed["path"], changed["before"]) == ("3.jpg", keys["3.jpg"])
    rows = rows_by_path(workspace)
    assert (rows["1.jpg"]["status"], rows["1.jpg"]["key"]) == ("vanished", keys["1.jpg"])
    assert rows["sub/other name.jpg"]["phash"] == rows["1.jpg"]["phash"] != b""

    save("2.jpg", gone)
    second = scan(make_config(), workspace, workers=0)

    assert {name for name in second.changes if second.changes[name]} == {"returned", "read", "taken_over"}
    assert rows_by_path(workspace)["2.jpg"]["status"] == "kept" and work["decoded"] == 2
    assert scan(make_config(), workspace, workers=0).parts_made == 0


def test_a_file_that_changes_after_it_was_looked_at_is_read_again_by_the_next_scan(
    ten_pictures, save, paint, make_config, workspace, monkeypatch
):  # fmt: skip
    real = sharding.scanning.manifest_part.stamp_rows

    def stamp_rows_then_change(config, rows):
        stamps = real(config, rows)
        save("5.jpg", paint(99))
        return stamps

    monkeypatch.setattr(sharding.scanning.manifest_part, "stamp_rows", stamp_rows_then_change)
    scan(make_config(part_size=100), workspace, workers=0)
    monkeypatch.undo()

    report = scan(make_config(part_size=100), workspace, workers=0)

    assert report.parts_made == report.changes["read"] == 1
    assert scan(make_config(part_size=100), workspace, workers=0).parts_made == 0


def test_stamps_that_are_lost_or_of_another_time_are_not_believed(ten_pictures, save, paint, make_config, workspace):
    config = make_config(part_size=100)
    scan(config, workspace, workers=0)
    hidden = stamps_path(list_parts(workspace.manifest)[0])
    old = hidden.read_bytes()
    save("3.jpg", paint(77))
    scan(config, workspace, workers=0)
    whole = hidden.read_bytes()

    hidden.write_bytes(old)  # a kill between the two renames leaves this
    assert scan(config, workspace, workers=0).parts_made == 0
    assert hidden.read_bytes() == whole
    hidden.write_bytes(b"damaged")
    save("4.jpg", paint(78))

    assert scan(config, workspace, workers=0).changes["read"] == 10


# --- people decide ---


def decide(workspace, **decisions):
    rows = [{"key": key, "decision": decision, "who": "me", "why": ""} for key, decision in decisions.items()]
    table = pa.Table.from_pylist(rows, schema=DECISIONS)
    write_part(workspace.decisions / part_name(0), table, made_from=str(rows))


def test_a_decision_overrules_the_filters_reads_only_its_file_and_outlives_scans(
    ten_pictures, save, paint, make_config, workspace, work, tmp_path
):  # fmt: skip
    save("small.png", paint(50, 20, 20))
    save("small too.png", paint(51, 20, 20))
    save("broken.jpg", b"nothing")
    config = make_config(filters={"min_pixels": 1000}, part_size=100, max_broken_fraction=1)
    scan(config, workspace, workers=0)
    keys = {path: row["key"] for path, row in rows_by_path(workspace).items()}
    work.clear()

    decide(workspace, **{keys["small.png"]: "keep", keys["broken.jpg"]: "keep", keys["small too.png"]: "drop"})
    report = scan(config, workspace, workers=0)

    statuses = {path: row["status"] for path, row in rows_by_path(workspace).items()}
    assert statuses["small.png"] == "kept" and rows_by_path(workspace)["small.png"]["phash"]
    assert (statuses["small too.png"], statuses["broken.jpg"]) == ("too_small", "not_an_image")
    assert report.parts_made == 1 and report.changes["taken_over"] == 12
    assert scan(config, workspace, workers=0).parts_made == 0
    save("3.jpg", paint(77))
    work.clear()
    scan(config, workspace, workers=0)
    assert work["read"] == 1 and rows_by_path(workspace)["small.png"]["status"] == "kept"
    fresh = Workspace(tmp_path / "fresh")
    decide(fresh, **{keys["small.png"]: "preferred_keeper"})
    scan(config, fresh, workers=0)
    assert manifest_bytes(fresh) == manifest_bytes(workspace)

    decide(workspace, **{keys["small.png"]: "drop"})
    scan(config, workspace, workers=0)

    assert rows_by_path(workspace)["small.png"]["status"] == "too_small"


# --- adversity ---


def test_tasks_on_the_same_part_at_once_write_what_one_would(ten_pictures, make_config, workspace, tmp_path):
    alone = Workspace(tmp_path / "alone")
    scan(make_config(), alone, workers=0)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: scan(make_config(), workspace, workers=0), range(4)))

    assert manifest_bytes(workspace) == manifest_bytes(alone)
    assert not list(workspace.root.rglob("*.partial-*"))
    assert scan(make_config(), workspace, workers=0).parts_made == 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_or_read_only_disk_is_an_error_with_code_1_and_damages_nothing(
    run, save, paint, tmp_path, monkeypatch, code
):
    assert run("scan")[0] == 0
    before = snapshot(tmp_path / "ws" / "manifest")
    save("0.jpg", paint(70))
    replace_file = os.replace

    def refuse(source, target):
        if "manifest" in str(target):
            raise OSError(code, os.strerror(code), str(target))
        return replace_file(source, target)

    monkeypatch.setattr(sharding.files.os, "replace", refuse)
    exit_code, _ = run("scan")

    assert exit_code == 1 and "part-00000.parquet" in run.err
    assert snapshot(tmp_path / "ws" / "manifest") == before
    assert not list((tmp_path / "ws").rglob("*.partial-*"))
    monkeypatch.undo()
    assert run("scan")[0] == 0 and snapshot(tmp_path / "ws" / "manifest") != before


def test_odd_files_are_kept_or_dropped_with_a_reason(save, paint, encode, make_config, workspace, tmp_path):
    bomb = bytearray(encode(paint(1, 8, 8), "PNG"))
    bomb[16:24] = struct.pack(">II", 100_000, 100_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    save("png named.jpg", encode(paint(1), "PNG"))
    save("jpeg named.webp", encode(paint(2)))
    save("bomb.png", bytes(bomb))
    save("empty.jpg", b"")
    save("loop/1.jpg", paint(3))
    (tmp_path / "raw" / "loop" / "again").symlink_to(tmp_path / "raw")
    (tmp_path / "raw" / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "raw" / "pipe.jpg")

    scan(make_config(), workspace, workers=0)

    rows = rows_by_path(workspace)
    assert {path: (row["status"], row["format"]) for path, row in rows.items()} == {
        "png named.jpg": ("kept", "png"), "jpeg named.webp": ("kept", "jpeg"), "loop/1.jpg": ("kept", "jpeg"),
        "bomb.png": ("too_many_pixels", ""), "empty.jpg": ("empty_file", ""),
    }  # fmt: skip


def test_members_of_tars_are_scanned_and_packed_with_their_sidecars(
    save, paint, encode, make_config, workspace, tmp_path
):
    (tmp_path / "raw").mkdir()
    pictures = {f"{number:09d}": encode(paint(number)) for number in range(3)}
    with tarfile.open(tmp_path / "raw" / "00000.tar", "w") as archive:
        for key, data in pictures.items():
            facts = json.dumps({"caption": "A dog, running", "url": "x", "key": key}).encode()
            for ending, content in ((".jpg", data), (".json", facts), (".txt", b"A dog, running"), (".mask.png", b"x")):
                info = tarfile.TarInfo(key + ending)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    config = make_config(sources={"tars": {"root": str(tmp_path / "raw"), "importer": "webdataset"}})

    scan(config, workspace, workers=0)

    rows = rows_by_path(workspace)
    assert list(rows) == [f"00000.tar/{key}.jpg" for key in pictures]
    first = rows["00000.tar/000000000.jpg"]
    assert first["status"] == "kept" and first["sha256"] == hashlib.sha256(pictures["000000000"]).hexdigest()
    assert dict(first["custom"]) == {"caption": "A dog, running"} and first["tags_general"] == []
    assert _read_source(tmp_path / "raw", first) == pictures["000000000"]
    task = ImageTask(first["key"], tmp_path / "raw" / first["path"], first["num_bytes"], {})
    assert prepare_image(task).status == "ok"
    assert scan(config, workspace, workers=0).parts_made == 0
    (tmp_path / "raw" / "00000.tar").unlink()
    scan(config, workspace, workers=0)
    assert {row["status"] for row in rows_by_path(workspace).values()} == {"vanished"}
    assert prepare_image(task).status == "unreadable"
    with pytest.raises(ImageError, match="missing_since_scan"):
        _read_source(tmp_path / "raw", first)


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

    monkeypatch.setattr(sharding.scanning.walk.os, "scandir", scandir)

    report = scan(make_config(), workspace, workers=0)

    assert report.status_counts == {"kept": 1}
    assert report.problems == (
        r"photos/caf\xe9.jpg: not_utf8_name: not UTF-8: rename it",
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
    decode, read = record_module.decode_grey, record_module._read
    monkeypatch.setattr(record_module, "decode_grey", lambda *a, **k: calls.update(["decode"]) or decode(*a, **k))
    monkeypatch.setattr(record_module, "_read", lambda task: calls.update(["read"]) or read(task))

    scan(make_config(), workspace, workers=0)

    assert calls == {"decode": 10, "read": 10}
    assert np.unique([row["key"] for row in rows_by_path(workspace).values()]).size == 10


def test_the_report_is_frozen(ten_pictures, make_config, workspace):
    report = scan(make_config(), workspace, workers=0)

    assert replace(report, num_files=3).num_files == 3
    with pytest.raises(AttributeError):
        report.num_files = 3
