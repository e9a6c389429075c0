import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sharding.chunk import Chunk, ChunkError, Sample, commit_chunk, is_sealed, open_chunk, write_shard
from training.ledger import LedgerError
from training.run_dir import RunDir
from training.started_chunk import StartedChunk


def make_chunk(folder: Path, *, caption: str = "a cat", num_samples: int = 3) -> Chunk:
    samples = [
        Sample(
            key=f"key{number}", image_name=f"key{number}.png", image=bytes([number]) * 100, facts={"n": number},
            caption=f"{caption} {number}",
            row={
                "width": 8, "height": 8, "groups": [], "dataset": "newest", "period": "", "repeats": 1,
                "loss_weight": 1.0,
            },
        )
        for number in range(num_samples)
    ]  # fmt: skip
    shard, rows = write_shard(folder, 0, samples)
    name = f"{folder.parent.name}/{folder.name}"
    return commit_chunk(
        folder, rows, name=name, shards=[shard], policy="p", shard_policy="p", made_from="m", seed=0
    )  # fmt: skip


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir(tmp_path / "runs" / "sote a")


def test_names_are_where_the_design_says(run):
    assert run.state_folder("newest/0005", 41216) == run.root / "chunks" / "newest" / "0005" / "state-00041216"
    assert run.relative(run.final_folder("newest/0005")) == "chunks/newest/0005/final"
    assert not run.root.exists()


@pytest.mark.parametrize("name", ["", "../x", "/x", "newest/../../x", "a\\b"])
def test_a_chunk_name_that_leads_out_of_the_run_is_refused(run, name):
    with pytest.raises(ValueError, match="chunk name"):
        run.chunk_folder(name)


def test_states_are_listed_without_partial_ones(run):
    for name in (
        "newest/0000/state-00000004",
        "newest/0000/final",
        "newest/0001/state-00000008.partial-7",
        "solo/final",
    ):
        (run.chunks_folder / name).mkdir(parents=True)
    (run.chunks_folder / "newest/0001/state-00000008.replaced-7").mkdir()

    assert [run.relative(path) for path in run.state_folders()] == [
        "chunks/newest/0000/final", "chunks/newest/0000/state-00000004",
        "chunks/newest/0001/state-00000008.replaced-7", "chunks/solo/final",
    ]  # fmt: skip
    assert len(run.state_folders("newest/0000")) == 2
    assert run.state_folders("newest/0007") == []


def test_a_lost_ledger_beside_states_is_an_error(run):
    run.state_folder("newest/0000", 4).mkdir(parents=True)

    with pytest.raises(LedgerError, match="missing, but there are 1 states"):
        run.open_ledger(guard=lambda: None)


def test_the_run_id_is_made_once(run):
    first = run.update_run_json(code="abc")
    second = run.update_run_json(code="def")

    assert first["run_id"] == second["run_id"] == second["wandb_id"]
    assert first["run_id"].startswith("sote-a-")
    assert run.read_run_json() == second | {"code": "def"}


def test_the_last_exit_code_is_that_of_this_slurm_job(run, monkeypatch):
    run.root.mkdir(parents=True)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert (run.last_exit_code(), run.read_last_exit()) == (1, None)

    run.write_last_exit(75, chunk="newest/0005")
    assert run.read_last_exit()["chunk"] == "newest/0005"
    assert run.last_exit_code() == 75

    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert run.last_exit_code() == 1
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run.clear_last_exit()
    assert run.last_exit_code() == 1


def test_a_stop_is_requested_seen_and_cleared(run):
    run.root.mkdir(parents=True)
    assert not run.stop_requested()

    run.request_stop("SIGTERM")
    assert run.stop_requested()

    run.clear_stop()
    run.clear_stop()
    assert not run.stop_requested()


def test_complete_json_is_read_back(run):
    assert run.read_complete("newest/0000") is None
    run.write_complete("newest/0000", global_step=10)
    assert run.read_complete("newest/0000") == {"global_step": 10}


# --- the run's copy of a chunk ---


def test_a_started_chunk_reads_the_copy_of_the_index_and_the_shards_where_they_are(run, tmp_path):
    chunk = make_chunk(tmp_path / "w" / "chunks" / "newest" / "0004")

    started = run.start_chunk(chunk)

    assert isinstance(started, StartedChunk)
    assert started.name == "newest/0004"
    assert started.info.digest == chunk.info.digest
    assert started.read_index().equals(chunk.read_index())
    assert started.index_path == run.chunk_folder("newest/0004") / "index.parquet"
    assert started.shard_path(started.info.shards[0].path).parent == chunk.folder
    assert is_sealed(chunk.folder)


def test_a_chunk_that_was_captioned_anew_continues_with_the_copy(run, tmp_path, caplog):
    folder = tmp_path / "w" / "chunks" / "newest" / "0004"
    first = make_chunk(folder)
    digest = run.start_chunk(first).info.digest
    rows = first.read_index().to_pylist()
    commit_chunk(
        folder, [row | {"caption": "new"} for row in rows], name=first.name, shards=first.info.shards, policy="q",
        shard_policy="p", made_from="m", seed=0,
    )  # fmt: skip

    started = run.start_chunk(open_chunk(folder))

    assert started.info.digest == digest != open_chunk(folder).info.digest
    assert started.read_index().column("caption").to_pylist() == ["a cat 0", "a cat 1", "a cat 2"]
    assert "packed anew" in caplog.text


def test_a_started_chunk_needs_no_chunk_json_in_the_workspace_any_more(run, tmp_path):
    chunk = make_chunk(tmp_path / "w" / "chunks" / "newest" / "0004")
    run.start_chunk(chunk)
    (chunk.folder / "chunk.json").unlink()
    chunk.index_path.unlink()

    assert run.started_chunk("newest/0004").read_index().num_rows == 3
    assert run.started_chunk("newest/0005") is None


def test_a_moved_workspace_is_followed(run, tmp_path):
    chunk = make_chunk(tmp_path / "w" / "chunks" / "newest" / "0004")
    run.start_chunk(chunk)
    shutil.move(tmp_path / "w", tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere" / "chunks" / "newest" / "0004"

    with pytest.raises(ChunkError, match=r"shard .* is missing"):
        run.started_chunk("newest/0004")
    started = run.start_chunk(open_chunk(moved))

    assert started.shard_path(started.info.shards[0].path).exists()
    assert run.started_chunk("newest/0004").folder == moved


def test_a_shard_of_another_size_is_refused(run, tmp_path):
    chunk = make_chunk(tmp_path / "w" / "chunks" / "newest" / "0004")
    run.start_chunk(chunk)
    with (chunk.folder / chunk.info.shards[0].path).open("ab") as stream:
        stream.write(b"x")

    with pytest.raises(ChunkError, match="bytes"):
        run.started_chunk("newest/0004")


def test_a_damaged_copy_is_refused(run, tmp_path):
    started = run.start_chunk(make_chunk(tmp_path / "w" / "chunks" / "newest" / "0004"))
    data = bytearray(started.index_path.read_bytes())
    data[100] ^= 1
    started.index_path.write_bytes(data)

    with pytest.raises(ChunkError, match="damaged"):
        run.started_chunk("newest/0004").read_index()


def test_a_copy_that_was_killed_half_way_is_made_again(run, tmp_path):
    chunk = make_chunk(tmp_path / "w" / "chunks" / "newest" / "0004")
    folder = run.chunk_folder("newest/0004")
    folder.mkdir(parents=True)
    (folder / "index.parquet").write_bytes(b"half")

    assert run.start_chunk(chunk).read_index().num_rows == 3
    assert json.loads((folder / "source.json").read_text()) == {"folder": str(chunk.folder)}


def test_run_dir_and_ledger_do_not_import_torch():
    code = "import sys, training.run_dir, training.ledger, training.lock; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
