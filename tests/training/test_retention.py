"""What a run keeps of its finished chunks, and that its folder stays below what was forecast."""

import os

import pytest

from tests.training.conftest import RUN_TOML, make_chunk
from tests.training.paper_run import TENSORS, PaperRun
from training.chunk_records import chunk_records
from training.forecast import DiskForecast, disk_forecast, folder_bytes
from training.retention import retain_finals
from training.run_dir import RunDir


class Watched(PaperRun):
    """Remembers the largest size that its folder ever had, while a state is being exchanged too."""

    largest = 0

    def save(self, folder, position, digests):
        super().save(folder, position, digests)
        if position.global_step % 10 < 2:
            self.largest = max(self.largest, folder_bytes(self.run_dir.root))


def make_run(tmp_path, *overrides, num_chunks):
    for number in range(num_chunks):
        make_chunk(tmp_path / "workspace", number, 2)
    toml = tmp_path / "run.toml"
    toml.write_text(RUN_TOML.format(workspace=tmp_path / "workspace"))
    return Watched(toml, tmp_path / "run", "batch.batch_size=2", *overrides)


def forecast_of(run, num_chunks):
    return disk_forecast(
        run.config, num_chunks=num_chunks, num_steps=1, num_images=2,
        index_bytes=run.run_dir.started_chunk("made/0000").index_path.stat().st_size, num_tensors=2,
        state_bytes=sum(4 * tensor.numel() for named in TENSORS.values() for tensor in named.values()),
        num_parameters=2000,
    )  # fmt: skip


def test_after_200_chunks_the_folder_is_below_the_forecast_with_what_was_asked_to_be_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # 4,600 of them would take half of the time
    run = make_run(
        tmp_path, "save.keep_chunks=3", "save.keep_every_chunks=50", "save.export_every_chunks=10",
        "save.keep_exports=4", num_chunks=200,
    )  # fmt: skip

    run.train_all()

    finals = sorted(run.run_dir.relative(path) for path in run.run_dir.state_folders())
    kept = [49, 99, 149, 196, 197, 198, 199]
    assert finals == [f"chunks/made/{number:04d}/final" for number in kept]
    exports = sorted(path.parent.name for path in run.run_dir.chunks_folder.glob("*/*/weights"))
    assert exports == ["0169", "0179", "0189", "0199"]
    forecast = forecast_of(run, 200)
    assert forecast.num_states == 2 + 1 + 4 + 4 and forecast.num_exports == 5
    assert run.largest < forecast.total
    assert folder_bytes(run.run_dir.root) < forecast.total


def test_without_milestones_only_the_newest_states_stay_and_all_exports(tmp_path):
    run = make_run(tmp_path, "save.keep_chunks=1", num_chunks=4)

    run.train_all()

    assert [path.parent.name for path in run.run_dir.state_folders()] == ["0003"]
    assert len(list(run.run_dir.chunks_folder.glob("*/*/weights"))) == 4
    assert forecast_of(run, 4).num_exports == 4


def test_nothing_goes_before_the_newer_state_verifies(tmp_path, caplog):
    run = make_run(tmp_path, "save.keep_chunks=2", num_chunks=3)
    run.train_all()
    newest = run.run_dir.final_folder("made/0002") / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)

    removed = retain_finals(chunk_records(run.ledger.lines), RunDir(run.run_dir.root), keep_chunks=1)

    assert removed == []  # the older one is the only one that verifies
    assert "SHA-256" in caplog.text


@pytest.mark.parametrize(("free", "is_enough"), [(10**9, True), (10**5, False)])
def test_a_forecast_says_when_the_disk_does_not_last(free, is_enough):
    forecast = DiskForecast(
        num_states=5, state_bytes=10**5, num_exports=2, export_bytes=10**4, preview_bytes=0, record_bytes=10**4
    )

    text = forecast.text(free_bytes=free, used_bytes=10**5)

    assert forecast.total == 530_000
    assert ("does not last" in text) is not is_enough
