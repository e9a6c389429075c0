"""Planned chunks become shards: nothing lost, nothing done twice, the same bytes every time."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from sharding.chunk import iterate_samples, open_chunk
from sharding.config import DatasetConfig
from sharding.files import DiskFullError
from sharding.images import BrokenFractionError, decode_rgb, probe
from sharding.pack import pack
from sharding.packing import shard as pack_shard_module
from sharding.packing.jobs import make_jobs, planned_chunks
from sharding.packing.rows import jobs_with_rows
from sharding.plan import make_plan
from sharding.schema import CAPTIONS, MANIFEST, Workspace
from sharding.tables import part_name, read_part, write_part

ROOT = Path(__file__).parents[2]
NAMES = [f"{number}.{'webp' if number % 5 == 4 else 'png' if number % 3 == 0 else 'jpg'}" for number in range(22)]


def fill(config, workspace, save, paint, names, *, words="a", made_from="1") -> dict[str, str]:
    """Write pictures, their kept records and captions; return path → key."""
    records, captions = [], []
    for number, name in enumerate(names):
        path = config.sources["photos"].root / name
        if not path.exists():
            options = {"lossless": True} if name.endswith(".webp") else {}
            save(name, paint(number, 64 + number % 5 * 8, 48), **options)
        data = path.read_bytes()
        facts = probe(data)
        sha256 = hashlib.sha256(data).hexdigest()
        records.append(
            dict.fromkeys(MANIFEST.names)
            | {
                "key": sha256[:16], "sha256": sha256, "dataset": "photos", "source": "photos", "path": name,
                "num_bytes": len(data), "format": facts.format, "width": facts.width, "height": facts.height,
                "is_pass_through": facts.is_pass_through, "rating": "general", "tags_general": ["solo", "sky"],
                "created_at": datetime(2022, 1, 2, tzinfo=UTC) if number % 2 else None, "status": "kept",
                "custom": [("artist_name", "Ann")] if number % 2 else [],
            }
        )  # fmt: skip
        text = f"{words} {number}, solo"
        captions.append({"key": sha256[:16], "text": text, "groups": [{"group": "general", "tags": text.split(", ")}]})
    for folder in (workspace.kept, workspace.manifest):
        write_part(folder / part_name(0), pa.Table.from_pylist(records, schema=MANIFEST), made_from=made_from)
    caption_table = pa.Table.from_pylist(captions, schema=CAPTIONS)
    write_part(workspace.captions("default") / part_name(0), caption_table, made_from=made_from + words)
    return {record["path"]: record["key"] for record in records}


def all_bytes(workspace: Workspace) -> dict[str, str]:
    """Return path → SHA-256 of everything under chunks/ that a reader may see."""
    files = [path for path in sorted(workspace.chunks.rglob("*")) if path.is_file() and path.name != ".checked"]
    return {
        path.relative_to(workspace.chunks).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def tar_times(workspace: Workspace) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in workspace.chunks.rglob("*.tar")}


@pytest.fixture
def config(make_config) -> DatasetConfig:
    return make_config(plan={"chunk_size": 10}, pack={"shard_size": 4}, max_broken_fraction=0.2)


@pytest.fixture
def keys(config, workspace, save, paint) -> dict[str, str]:
    found = fill(config, workspace, save, paint, NAMES)
    make_plan(config, workspace)
    return found


def test_every_planned_sample_is_packed_in_plan_order(config, workspace, keys):
    report = pack(config, workspace, workers=0)

    assert report.packed == ("photos/0000", "photos/0001", "photos/0002")
    assert (report.num_samples, report.num_dropped) == (22, 0)
    plan = read_part(workspace.plan / part_name(0)).to_pylist()
    for number in range(3):
        chunk = open_chunk(workspace.chunks / "photos" / f"{number:04d}")
        planned = [row["key"] for row in plan if row["chunk"] == number]
        assert chunk.read_index().column("key").to_pylist() == planned
    assert [shard.num_samples for shard in open_chunk(workspace.chunks / "photos" / "0000").info.shards] == [4, 4, 2]
    assert not list(workspace.chunks.rglob(".building"))


def test_jpeg_and_png_pass_through_unchanged_and_others_become_jpeg(config, workspace, keys):
    pack(config, workspace, workers=0)

    paths = {key: config.sources["photos"].root / path for path, key in keys.items()}
    for number in range(3):
        chunk = open_chunk(workspace.chunks / "photos" / f"{number:04d}")
        rows = {row["key"]: row for row in chunk.read_index().to_pylist()}
        for key, image, facts, text in iterate_samples(chunk):
            source = paths[key].read_bytes()
            if paths[key].suffix == ".webp":
                assert rows[key]["image_name"] == f"{key}.jpg"
                assert Image.open(io.BytesIO(image)).format == "JPEG"
                assert facts["image_sha256"] == hashlib.sha256(image).hexdigest() != facts["sha256"]
            else:
                assert image == source
                assert rows[key]["image_name"] == f"{key}{paths[key].suffix}"
            assert facts["sha256"] == hashlib.sha256(source).hexdigest()
            assert text == rows[key]["caption"] == facts["caption"]
            assert decode_rgb(image).size == (rows[key]["width"], rows[key]["height"])


def test_facts_are_flat_without_null_and_have_the_same_types_everywhere(config, workspace, keys):
    pack(config, workspace, workers=0)

    chunk = open_chunk(workspace.chunks / "photos" / "0000")
    every = [facts for _, _, facts, _ in iterate_samples(chunk)]
    assert len({tuple((name, type(value)) for name, value in facts.items()) for facts in every}) == 1
    assert {facts["artist_name"] for facts in every} == {"", "Ann"}
    assert {facts["created_at"] for facts in every} == {"", "2022-01-02T00:00:00+00:00"}
    assert all(value is not None and not isinstance(value, dict) for facts in every for value in facts.values())
    assert every[0]["status"] == "success" and every[0]["tags"] == "solo, sky"


def test_a_lossless_original_can_be_stored_as_png(make_config, workspace, save, paint):
    config = make_config(pack={"lossless_as_png": True})
    fill(config, workspace, save, paint, ["a.bmp"])
    make_plan(config, workspace)

    pack(config, workspace, workers=0)

    [(_, image, _, _)] = iterate_samples(open_chunk(workspace.chunks / "photos" / "0000"))
    assert Image.open(io.BytesIO(image)).format == "PNG"
    assert list(decode_rgb(image).tobytes()) == list(paint(0, 64, 48).tobytes())


def test_packing_twice_gives_identical_digests_with_any_number_of_workers(config, workspace, keys, tmp_path):
    pack(config, workspace, workers=0)
    first = all_bytes(workspace)

    for path in sorted(workspace.chunks.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    pack(config, workspace, workers=2)

    assert all_bytes(workspace) == first


def test_current_chunks_are_skipped_and_a_dry_run_writes_nothing(config, workspace, keys):
    dry = pack(config, workspace, dry_run=True)
    assert len(dry.packed) == 3 and dry.forecast_bytes > 0 and not workspace.chunks.exists()
    pack(config, workspace, workers=0)
    before = tar_times(workspace)

    again = pack(config, workspace, workers=0)
    for marker in workspace.chunks.rglob(".checked"):
        marker.unlink()
    without_markers = pack(config, workspace, workers=0)

    assert (again.packed, again.num_current) == ((), 3)
    assert (without_markers.packed, without_markers.recaptioned, without_markers.num_current) == ((), (), 3)
    assert tar_times(workspace) == before


def test_tasks_own_every_nth_chunk(config, workspace, keys):
    assert pack(config, workspace, part_index=1, num_parts=2).packed == ("photos/0001",)
    assert pack(config, workspace, part_index=0, num_parts=2).packed == ("photos/0000", "photos/0002")
    with pytest.raises(ValueError, match="outside 0 … 1"):
        pack(config, workspace, part_index=2, num_parts=2)


def test_added_pictures_change_only_the_short_last_chunk(config, workspace, keys, save, paint):
    pack(config, workspace)
    before = all_bytes(workspace)
    fill(config, workspace, save, paint, [*NAMES, "new-1.jpg", "new-2.jpg"], made_from="2")
    make_plan(config, workspace)

    report = pack(config, workspace)

    assert (report.packed, report.num_current) == (("photos/0002",), 2)
    after = all_bytes(workspace)
    assert {path for path in before if not path.startswith("photos/0002")} <= set(after)
    assert all(after[path] == before[path] for path in before if not path.startswith("photos/0002"))
    assert open_chunk(workspace.chunks / "photos" / "0002").info.num_samples == 4


def test_rows_that_do_not_fit_into_memory_are_sorted_on_disk(config, workspace, keys):
    plan = planned_chunks(read_part(workspace.plan / part_name(0)), workspace.chunks)
    jobs = make_jobs(config, workspace, plan)

    at_once = list(jobs_with_rows(workspace, "default", jobs))
    in_groups = list(jobs_with_rows(workspace, "default", jobs, rows_per_group=12))

    assert [job.records.num_rows for job in at_once] == [10, 10, 2]
    assert all(one.records.equals(other.records) for one, other in zip(at_once, in_groups, strict=True))
    assert at_once[0].records.column("key").to_pylist() == plan[at_once[0].folder].column("key").to_pylist()
    assert not list(workspace.root.glob("pack-rows*"))


# --- captions ---


def test_missing_captions_are_refused_before_anything_is_written(config, workspace, keys):
    part = workspace.captions("default") / part_name(0)
    write_part(part, read_part(part).slice(3), made_from="fewer")

    with pytest.raises(ValueError, match=r"captions/default: 3 of 22 keys have no caption, first [0-9a-f]{16}; run"):
        pack(config, workspace)

    assert not workspace.chunks.exists()


@pytest.mark.parametrize("captions_only", [True, False])
def test_new_captions_change_the_index_and_leave_the_tars(config, workspace, keys, save, paint, captions_only):
    pack(config, workspace)
    old = open_chunk(workspace.chunks / "photos" / "0000")
    before = tar_times(workspace)
    fill(config, workspace, save, paint, NAMES, words="b")

    report = pack(config, workspace, captions_only=captions_only)

    new = open_chunk(workspace.chunks / "photos" / "0000")
    assert (report.packed, len(report.recaptioned)) == ((), 3)
    assert tar_times(workspace) == before
    assert all(caption.startswith("b ") for caption in new.read_index().column("caption").to_pylist())
    assert all(text.startswith("a ") for _, _, _, text in iterate_samples(new))
    assert new.info.shard_captions == old.info.shard_captions
    assert new.info.digest != old.info.digest
    assert not old.index_path.exists()

    # --- and the tars can be brought up to date ---

    assert len(pack(config, workspace, rewrite_shards=True).packed) == 3
    assert all(text.startswith("b ") for _, _, _, text in iterate_samples(open_chunk(new.folder)))
    assert pack(config, workspace, rewrite_shards=True).packed == ()


def test_captions_only_packs_no_new_chunk(config, workspace, keys):
    report = pack(config, workspace, captions_only=True)

    assert len(report.not_packed) == 3 and not list(workspace.chunks.glob("*/*/chunk.json"))
    assert "without --captions-only" in report.summary()


def test_a_trained_chunk_keeps_its_tars(config, workspace, keys, make_config):
    pack(config, workspace)
    (workspace.chunks / "photos" / "0001" / "trained-by-r1").touch()
    before = {path: time for path, time in tar_times(workspace).items() if path.parent.name == "0001"}
    other = make_config(plan={"chunk_size": 10}, pack={"shard_size": 5})

    report = pack(other, workspace)

    assert report.sealed == ("photos/0001",)
    assert report.packed == ("photos/0000", "photos/0002")
    assert {path: time for path, time in tar_times(workspace).items() if path.parent.name == "0001"} == before


# --- what can go wrong ---


def test_a_file_that_changed_since_the_scan_is_dropped_with_evidence(config, workspace, keys, save, paint):
    save("0.png", paint(99))
    (config.sources["photos"].root / "1.jpg").unlink()

    report = pack(config, workspace)

    drops = [row for path in workspace.pack_drops.glob("*") for row in read_part(path).to_pylist()]
    assert {(row["path"], row["reason"]) for row in drops} == {
        ("0.png", "changed_since_scan"), ("1.jpg", "missing_since_scan"),
    }  # fmt: skip
    assert (report.num_dropped, report.num_samples) == (2, 20)
    assert sum(open_chunk(workspace.chunks / name).info.num_dropped for name in report.packed) == 2
    assert pack(config, workspace).num_current == 3


def test_too_many_broken_files_commit_nothing_of_the_chunk(config, workspace, keys):
    for name in NAMES[:15]:
        (config.sources["photos"].root / name).write_bytes(b"gone bad")

    with pytest.raises(BrokenFractionError, match=r"max_broken_fraction = 0\.2; first: photos/"):
        pack(config, workspace)

    assert not list(workspace.chunks.rglob("chunk.json")) and not list(workspace.chunks.rglob("*.tar"))


def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(config, workspace, keys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())

    with pytest.raises(DiskFullError, match="packing needs"):
        pack(config, workspace)

    assert not workspace.chunks.exists()


def test_a_missing_source_folder_is_named(config, workspace, keys):
    config.sources["photos"].root.rename(workspace.root / "elsewhere")

    with pytest.raises(FileNotFoundError, match=r"sources\.photos\.root"):
        pack(config, workspace)


def test_without_a_plan_packing_says_what_to_run(config, workspace):
    with pytest.raises(FileNotFoundError, match="sharding plan"):
        pack(config, workspace)


# --- resume ---


def test_a_broken_off_pack_takes_over_finished_shards(config, workspace, keys, monkeypatch):
    pack(config, workspace)
    whole = all_bytes(workspace)
    for path in sorted(workspace.chunks.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    read_source, num_read = pack_shard_module._read_source, 0

    def stop_at_the_sixth(root, row):
        nonlocal num_read
        num_read += 1
        if num_read == 6:
            raise KeyboardInterrupt
        return read_source(root, row)

    monkeypatch.setattr(pack_shard_module, "_read_source", stop_at_the_sixth)
    with pytest.raises(KeyboardInterrupt):
        pack(config, workspace)
    assert not list(workspace.chunks.rglob("chunk.json"))

    num_read = 100
    pack(config, workspace)

    assert num_read == 100 + 22 - 4  # the first shard of 4 was not read again
    assert all_bytes(workspace) == whole


@pytest.mark.slow
def test_kill_9_in_the_middle_of_a_pack_and_a_second_run_give_the_same_bytes(config, workspace, keys, tmp_path):
    pack(config, workspace)
    whole = all_bytes(workspace)
    other = Workspace(tmp_path / "other")
    for name in ("dedupe", "plan", "captions"):
        (other.root / name).parent.mkdir(parents=True, exist_ok=True)
        (other.root / name).symlink_to(workspace.root / name)
    program = f"""
import json, sys, time
from pathlib import Path
from sharding.packing import shard as pack_shard
from sharding.config import DatasetConfig
from sharding.pack import pack
from sharding.packing.jobs import make_jobs, planned_chunks
from sharding.packing.rows import jobs_with_rows
from sharding.schema import Workspace
read = pack_shard._read_source
def slowly(root, row):
    time.sleep(0.05)
    return read(root, row)
pack_shard._read_source = slowly
config = DatasetConfig.model_validate(json.loads({config.model_dump_json()!r}))
pack(config, Workspace(Path({str(other.root)!r})), workers=0)
"""
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", program], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
        num_tars = len(list(other.chunks.rglob("shard-*.tar")))
        deadline = time.monotonic() + 30
        while len(list(other.chunks.rglob("shard-*.tar"))) <= num_tars and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.06)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL

    pack(config, other)

    assert all_bytes(other) == whole


def test_the_index_of_a_chunk_is_one_row_per_sample_with_its_groups(config, workspace, keys):
    pack(config, workspace)

    [row, *_] = open_chunk(workspace.chunks / "photos" / "0000").read_index().to_pylist()
    assert row["groups"] == [{"group": "general", "tags": row["caption"].split(", ")}]
    assert (row["dataset"], row["period"], row["repeats"], row["loss_weight"]) == ("photos", "", 1, 1.0)
    assert json.dumps(row)
