from dataclasses import replace
from pathlib import Path

import pytest

from tests.training.toy import toy_config
from training.forecast import DiskForecast
from training.launch_doctor.data import DataFindings
from training.launch_doctor.examination import examine
from training.launch_doctor.process import Device, Process
from training.launch_doctor.room import Step, decode_row, disk_row, exchange_row, memory_row

GB = 10**9
GPU = Device("A100", 80 * GB, 79 * GB, "570.1", "card")
FLOPS = 1e14


class FakeEstimate:
    """Takes a fixed number of bytes."""

    def __init__(self, peak):
        self._peak = peak

    def peak(self, micro_batch_size):
        return self._peak


def step(*, peak=40 * GB, flops_per_image=10**12, gradient_bytes=4 * GB):
    return Step(flops_per_image, 16.0, gradient_bytes, FakeEstimate(peak), 4)


def process(rank, device=GPU, num_cpus=16):
    return Process(rank, 0, 1, f"n{rank}", rank, num_cpus, 1, device, {})


def measured(images_per_second):
    return DataFindings(images_per_second=images_per_second, flops_per_second=FLOPS)


@pytest.mark.parametrize(
    ("peak", "free", "verdict"), [(40 * GB, 79 * GB, "ok"), (78 * GB, 79 * GB, "fail"), (40 * GB, 30 * GB, "fail")]
)
def test_the_plan_is_compared_with_what_the_fullest_card_has(peak, free, verdict):
    row = memory_row(step(peak=peak), [process(0), process(1, replace(GPU, free_bytes=free))])

    assert row.verdict == verdict
    assert verdict == "ok" or "rank 1" in row.found or "rank 0–1" in row.found


def test_processes_on_cpus_share_the_memory_of_their_node():
    cpu = Device("CPU", 64 * GB, 64 * GB, "", "")
    alone, both = [process(0, cpu)], [process(0, cpu), replace(process(1, cpu), node="n0")]

    assert memory_row(step(), alone).verdict == "ok"
    assert memory_row(step(), both).verdict == "fail"


@pytest.mark.parametrize(
    ("images_per_second", "num_cpus", "verdict"), [(20.0, 16, "ok"), (15.0, 16, "warn"), (30.0, 1, "warn")]
)
def test_loaders_are_compared_with_the_step_and_cores_count(images_per_second, num_cpus, verdict):
    config = toy_config(data={"workers": 2})  # a step of 1e12 operations takes 40 images a second at most

    row = decode_row(config, step(), [process(0, num_cpus=num_cpus)], {0: measured(images_per_second)})

    assert row.verdict == verdict
    assert verdict == "ok" or "data.workers = " in row.advice


def test_nothing_is_asked_of_loaders_when_latents_are_read():
    config = toy_config(latents={"use": True}, save={"every_steps": 10})

    assert decode_row(config, step(), [process(0)], {}).verdict == "ok"


@pytest.mark.parametrize(("bytes_per_second", "verdict"), [(100 * GB, "ok"), (1 * GB, "warn")])
def test_an_exchange_that_takes_longer_than_a_part_of_the_step_is_warned_of(bytes_per_second, verdict):
    assert exchange_row(step(), 2, {0: measured(20.0)}, bytes_per_second).verdict == verdict


@pytest.mark.parametrize(("free", "verdict"), [(100, "ok"), (40, "warn"), (10, "fail")])
def test_the_disk_must_hold_the_chunk_and_should_hold_the_run(free, verdict):
    forecast = DiskForecast(
        num_states=5, state_bytes=10 * GB, num_exports=1, export_bytes=GB, preview_bytes=0, record_bytes=0
    )

    row = disk_row(forecast, "a/0000", keep_states=2, free_bytes=free * GB, used_bytes=0)

    assert row.verdict == verdict


def test_tasks_of_srun_that_each_believe_themselves_alone_are_told_once(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    reports = []
    for number in range(2):
        monkeypatch.setenv("SLURM_PROCID", str(number))
        reports.append(examine(toy_config(), Path("none"), num_processes=None, timeout_seconds=1))

    assert reports[0].code == 3
    assert "each believes itself alone" in reports[0].rows[0].found
    assert reports[1] is None


def test_a_rank_that_cannot_reach_rank_0_says_so_itself(monkeypatch):
    values = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)

    report = examine(toy_config(), Path("none"), num_processes=None, timeout_seconds=1)

    assert (report.code, report.is_hung) == (3, True)
    assert report.rows[0].found.startswith("rendezvous at 127.0.0.1:9: rank 0 of node number 0: ")
