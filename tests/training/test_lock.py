import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from training import launch_identity, lock
from training.launch_identity import this_launch
from training.lock import LockHeldError, LockLostError, RunLock, read_holder

HOLD = """
import sys, time
from pathlib import Path
from training.lock import LockHeldError, RunLock
path = Path(sys.argv[1])
try:
    held = RunLock.acquire(path, heartbeat_seconds=0.3)
except LockHeldError as error:
    print("held", flush=True)
    sys.exit(0)
print("got", held.number, flush=True)
time.sleep(float(sys.argv[2]))
held.release()
"""


def run_holder(path, seconds):
    return subprocess.Popen([sys.executable, "-c", HOLD, str(path), str(seconds)], stdout=subprocess.PIPE, text=True)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "lock"


def pretend(monkeypatch, **changes):
    """Make this process look like another launch from now on."""
    launch = replace(this_launch(), **changes)
    monkeypatch.setattr(lock, "this_launch", lambda: launch)


def abandon(held):
    """Leave a lock as a killed process does: no more beats, nothing cleaned up."""
    held._ended.set()
    held._thread.join()


def test_a_lock_says_who_holds_it_and_is_gone_after_release(path):
    with RunLock.acquire(path) as held:
        written = json.loads(path.read_text())
        assert written["number"] == held.number == 1
        assert written["launch"]["pid"] == os.getpid()
        assert read_holder(path) == held.holder
        held.check()

    assert not path.exists()
    assert read_holder(path) is None
    with pytest.raises(LockLostError):
        held.check()


def test_numbers_grow_over_releases(path):
    numbers = []
    for _ in range(3):
        with RunLock.acquire(path) as held:
            numbers.append(held.number)

    assert numbers == [1, 2, 3]
    assert len(list(path.with_name("fence").iterdir())) == 2  # the claim and its release


def test_a_living_holder_keeps_the_lock_however_late_its_heartbeat(path):
    with RunLock.acquire(path) as held:
        with pytest.raises(LockHeldError, match=rf"process {os.getpid()} on .* since .*; wait for it, or ask"):
            RunLock.acquire(path, now=lambda: time.time() + 9999)
        held.check()


def test_a_killed_process_of_this_host_is_taken_over_at_once(path):
    process = run_holder(path, 60)
    assert process.stdout.readline() == "got 1\n"
    with pytest.raises(LockHeldError, match=f"process {process.pid}"):
        RunLock.acquire(path)
    process.send_signal(signal.SIGKILL)
    time.sleep(0.2)  # dead, but not reaped: a zombie

    with RunLock.acquire(path) as held:
        assert held.number == 2
    process.wait()
    process.stdout.close()


def test_a_reused_process_number_is_taken_over_at_once(path, monkeypatch):
    with monkeypatch.context() as patched:
        pretend(patched, process_start="12")
        abandon(RunLock.acquire(path))

    with RunLock.acquire(path) as held:
        assert held.number == 2


def test_a_lock_from_before_a_reboot_is_taken_over_at_once(path, monkeypatch):
    with monkeypatch.context() as patched:
        pretend(patched, boot_id="another")
        abandon(RunLock.acquire(path))
    monkeypatch.setattr(launch_identity, "_boot_time", lambda: time.time() + 5)

    with RunLock.acquire(path) as held:
        assert held.number == 2


def test_another_machine_of_the_same_name_that_beats_is_not_mistaken_for_a_reboot(path, monkeypatch):
    with monkeypatch.context() as patched:
        pretend(patched, boot_id="another")
        held = RunLock.acquire(path, heartbeat_seconds=0.3)

    with pytest.raises(LockHeldError):
        RunLock.acquire(path)
    held.check()
    held.release()


def test_another_hosts_lock_is_taken_over_after_two_heartbeats_of_silence(path, monkeypatch, caplog):
    with monkeypatch.context() as patched:
        pretend(patched, host="far-away")
        lost = RunLock.acquire(path, heartbeat_seconds=30)
    abandon(lost)
    clock = [path.stat().st_mtime + 50.0]

    def sleep(seconds):
        clock[0] += seconds

    with RunLock.acquire(path, now=lambda: clock[0], sleep=sleep) as held:
        assert held.number == 2
        assert 60 < clock[0] - path.stat().st_mtime + 1 < 75
        assert "waiting up to 60 s" in caplog.text
        assert "taking over from process" in caplog.text
        with pytest.raises(LockLostError, match="fencing number is 2, ours is 1"):
            lost.check()


def test_another_hosts_lock_that_beats_is_held(path, monkeypatch):
    with monkeypatch.context() as patched:
        pretend(patched, host="far-away")
        held = RunLock.acquire(path, heartbeat_seconds=0.3)

    with pytest.raises(LockHeldError, match="far-away"):
        RunLock.acquire(path)
    held.release()


def test_a_requeued_slurm_job_takes_over_its_earlier_self_at_once(path, monkeypatch):
    with monkeypatch.context() as patched:
        pretend(patched, host="far-away", slurm_job_id="77", slurm_restart_count=0)
        abandon(RunLock.acquire(path))
    with monkeypatch.context() as patched:
        pretend(patched, slurm_job_id="77", slurm_restart_count=1)

        with RunLock.acquire(path) as held:
            assert held.number == 2


def test_the_heartbeat_renews_the_lock_file_and_puts_it_back_when_deleted(path):
    with RunLock.acquire(path, heartbeat_seconds=0.06) as held:
        first = path.stat().st_mtime_ns
        path.unlink()
        time.sleep(0.2)

        assert path.stat().st_mtime_ns > first
        held.check()


def test_a_lost_lock_is_not_released(path, monkeypatch):
    with monkeypatch.context() as patched:
        pretend(patched, process_start="12")
        lost = RunLock.acquire(path)

    with RunLock.acquire(path) as held:
        lost.release()
        assert path.exists()
        held.check()


def test_where_there_are_no_hard_links_claims_are_made_by_exclusive_creation(path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(1, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)

    with RunLock.acquire(path) as held:
        held.check()
        with pytest.raises(LockHeldError):
            RunLock.acquire(path)
    assert not path.exists()


def test_of_several_processes_exactly_one_gets_a_dead_ones_lock(path, monkeypatch):
    with monkeypatch.context() as patched:
        pretend(patched, process_start="12")
        abandon(RunLock.acquire(path))

    processes = [run_holder(path, 1.5) for _ in range(4)]
    answers = sorted(process.communicate()[0].strip() for process in processes)

    assert answers == ["got 2", "held", "held", "held"]


def test_threads_that_acquire_and_release_never_hold_the_lock_together(path):
    from concurrent.futures import ThreadPoolExecutor

    inside, seen = [], []

    def work(_):
        for _ in range(20):
            try:
                held = RunLock.acquire(path)
            except LockHeldError:
                continue
            inside.append(held.number)
            seen.append((held.number, len(inside)))
            time.sleep(0.001)
            inside.remove(held.number)
            held.release()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))

    assert {count for _, count in seen} == {1}
    assert len({number for number, _ in seen}) == len(seen)
