import os
import threading
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from training.launch_doctor import folder as folder_module
from training.launch_doctor.clock import Skew, clock_rows, measure_skew
from training.launch_doctor.data import DataFindings, data_rows
from training.launch_doctor.folder import look_at_folder
from training.launch_doctor.folder_findings import FolderFindings, folder_rows
from training.launch_doctor.network import Network, network_rows
from training.launch_doctor.process import Device, Process, process_rows, scouts, silent_row, this_process
from training.launch_doctor.report import Report, Row, listing
from training.launch_doctor.team import Answer, SilentRanksError, Team

GIB = 1 << 30


def process(rank, **changes):
    gpu = Device("A100", 80 * GIB, 79 * GIB, "570.1", f"card {rank}")
    made = Process(
        rank, rank % 2, 2, f"n{rank // 2}", 100 + rank, 16, 1, gpu, {"torch": "2.13", "python": "3.11", "numpy": "2.4"}
    )
    return replace(made, **changes)


def on_all(world_size, work, *, timeout_seconds=10.0):
    """Do work(team) on every rank of a team of threads; return what each gave or raised."""
    store, given = dist.HashStore(), {}

    def run(rank):
        team = Team(store, rank=rank, world_size=world_size, timeout_seconds=timeout_seconds)
        try:
            given[rank] = work(team)
        except Exception as error:
            given[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [given[rank] for rank in range(world_size)]


def verdicts(rows):
    return {row.what: row.verdict for row in rows}


# --- the team ---


def test_rank_0_gets_the_answers_of_all_and_a_problem_is_an_answer():
    def work(team):
        return team.phase("look", lambda: 1 / (2 - team.rank))

    first, second, third = on_all(3, work)

    assert [answer.value for answer in first] == [0.5, 1.0, None]
    assert first[2].problem.startswith("ZeroDivisionError: ")
    assert second == [Answer(1.0)]
    assert third[0].value is None


def test_a_rank_that_never_comes_is_named_in_time(monkeypatch):
    monkeypatch.setattr("training.launch_doctor.team._GRACE_SECONDS", 0.1)

    def work(team):
        return None if team.rank == 1 else team.phase("look", lambda: 1)

    start = time.monotonic()
    first, _, third = on_all(3, work, timeout_seconds=0.2)

    assert time.monotonic() - start < 2
    assert isinstance(first, SilentRanksError)
    assert first.ranks == {1: "did not come"}
    assert third == [Answer(1)]


def test_work_that_hangs_because_one_rank_is_missing_blames_that_rank():
    meeting = threading.Event()

    def work(team):
        return None if team.rank == 1 else team.phase("meet", lambda: meeting.wait(2))

    first, _, third = on_all(3, work, timeout_seconds=0.2)
    meeting.set()

    assert first.ranks == {1: "did not come"}
    assert isinstance(third, SilentRanksError)


def test_the_problem_of_a_rank_that_others_wait_for_is_told():
    def work(team):
        def look():
            if team.rank == 1:
                raise OSError("stale file handle")
            return team.read("never", of=1)

        return team.phase("look", look)

    first, _ = on_all(2, work, timeout_seconds=0.5)

    assert first.ranks == {1: "OSError: stale file handle"}


def test_silent_ranks_are_told_by_node():
    row = silent_row({2: "did not come", 3: "did not come", 5: "did not come"}, "network", [process(0), process(3)], 9)

    assert row.verdict == "fail"
    assert row.found == "network: rank 2–3 of n1; rank 5 of node number 2: did not come"


# --- processes ---


def test_processes_that_are_alike_are_fine():
    rows = list(process_rows([process(rank) for rank in range(4)], wanted=4))

    assert set(verdicts(rows).values()) == {"ok"}
    assert rows[0].found == "4 of 2 nodes: 2 on n0; 2 on n1"
    assert scouts([process(rank) for rank in range(4)]) == [0, 2]


@pytest.mark.parametrize(
    ("changes", "what", "verdict"),
    [
        ({"num_same_rank": 2}, "processes", "fail"),
        ({"device": Device("A100", 80 * GIB, 79 * GIB, "570.1", "card 2")}, "one card each", "fail"),
        ({"device": Device("A100", 80 * GIB, 20 * GIB, "570.1", "card 3")}, "free cards", "warn"),
        ({"device": Device("A100", 40 * GIB, 40 * GIB, "570.1", "card 3")}, "devices", "warn"),
        ({"versions": {"torch": "2.12", "python": "3.11", "numpy": "2.4"}}, "versions", "fail"),
        ({"versions": {"torch": "2.13", "python": "3.11", "numpy": "2.3"}}, "versions", "warn"),
        ({"node": "n7"}, "processes", "warn"),
    ],
)
def test_one_process_that_differs_is_noticed(changes, what, verdict):
    rows = list(process_rows([*(process(rank) for rank in range(3)), process(3, **changes)], wanted=None))

    assert verdicts(rows)[what] == verdict
    assert all(row.advice for row in rows if row.verdict != "ok")


def test_a_launcher_that_started_fewer_processes_is_noticed():
    assert verdicts(process_rows([process(0, node="n0")], wanted=2))["processes"] == "fail"


def test_this_process_can_be_described(monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "n5")

    found = this_process(torch.device("cpu"), num_same_rank=1)

    assert (found.node, found.pid, found.device.is_gpu) == ("n5", os.getpid(), False)
    assert found.device.total_bytes > 0
    assert len(found.versions["source"]) == 12


# --- network ---


def test_a_wrong_sum_and_a_rank_that_believes_itself_alone_fail():
    fine = Network(2, "gloo", True, 0.001, [(1, 2e9), (2, 2e9), (3, 2e9)])

    assert verdicts(network_rows([Answer(fine), Answer(fine)])) == {"round trip": "ok", "bandwidth": "ok"}
    assert verdicts(network_rows([Answer(fine), Answer(replace(fine, is_right=False))]))["round trip"] == "fail"
    assert verdicts(network_rows([Answer(replace(fine, believed=1))] * 2)) == {"round trip": "fail"}
    assert verdicts(network_rows([Answer(fine), Answer(None, "no route\nto host")])) == {"round trip": "fail"}


def test_a_slow_network_between_gpus_is_warned_of():
    slow = Network(2, "nccl", True, 0.02, [(1, 2e8), (2, 2e8), (3, 2e8)])

    assert verdicts(network_rows([Answer(slow), Answer(slow)])) == {"round trip": "warn", "bandwidth": "warn"}


# --- the folder ---


def look(team, root, ranks):
    return team.phase("run folder", lambda: look_at_folder(team, root, ranks))


def test_two_nodes_see_one_folder_with_whole_renames_and_one_winner(tmp_path):
    first, _ = on_all(2, lambda team: look(team, tmp_path / "runs" / "a", [0, 1]))

    found = FolderFindings(**first[0].value)
    rows = list(folder_rows(found, tmp_path / "runs" / "a", {0: "n0", 1: "n1"}))

    assert verdicts(rows) == {"run folder": "ok", "renames": "ok", "lock": "ok", "flock": "ok"}
    assert found.winners == [1] * 5
    assert found.num_reads > 1
    assert list(tmp_path.iterdir()) == []  # nothing stays


def test_a_node_that_sees_another_folder_fails(tmp_path):
    roots = [tmp_path / "shared", tmp_path / "local"]
    for root in roots:
        root.mkdir()

    def work(team):
        return look(team, roots[team.rank], [0, 1])

    first, _ = on_all(2, work, timeout_seconds=4.0)
    rows = list(folder_rows(FolderFindings(**first[0].value), roots[0], {0: "n0", 1: "n1"}))

    assert verdicts(rows)["run folder"] == "fail"
    assert verdicts(rows)["lock"] == "fail"
    assert "n1" in rows[0].found


def test_torn_reads_two_winners_and_slow_folders_are_told(tmp_path):
    found = FolderFindings({"1": 0.1}, {"1": 9.0}, 10, 1, 0, [1, 2], 2, False, "shared")

    rows = list(folder_rows(found, tmp_path, {0: "n0", 1: "n1"}))

    assert verdicts(rows) == {"run folder": "warn", "renames": "fail", "lock": "fail", "flock": "warn"}
    assert "exclusive creation" in rows[2].found


def test_a_system_without_flock_and_links_still_has_a_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module.importlib.util, "find_spec", lambda name: None)

    def no_link(*_):
        raise PermissionError(1, "no hard links here")

    monkeypatch.setattr(os, "link", no_link)
    ((answer,),) = on_all(1, lambda team: look(team, tmp_path, [0]))
    found = FolderFindings(**answer.value)

    assert (found.flock, found.has_links, found.winners) == ("none", False, [1] * 5)
    assert verdicts(folder_rows(found, tmp_path, {0: "n0"}))["lock"] == "ok"


# --- clocks ---


def test_the_skew_of_a_clock_is_found_within_its_uncertainty():
    def work(team):
        return measure_skew(team, [0, 1], now=lambda: time.time() + 5.0 * team.rank)

    first, _ = on_all(2, work)
    skew = Skew(*first["1"])

    assert abs(skew.seconds - 5.0) <= skew.uncertainty_seconds < 1.0


@pytest.mark.parametrize(("seconds", "verdict"), [(0.9, "ok"), (-5.0, "warn"), (100.0, "fail")])
def test_clocks_may_differ_by_a_second(seconds, verdict):
    rows = list(clock_rows({1: Skew(0.0, 0.01), 2: Skew(seconds, 0.01)}, {1: "n1", 2: "n2"}, Skew(-99.0, 0.01)))

    assert verdicts(rows) == {"clocks": verdict, "file clock": "warn"}
    assert verdict == "ok" or "n2" in rows[0].found


# --- data ---


def test_weights_or_chunks_that_differ_between_nodes_fail():
    fine = DataFindings({"unet.safetensors": 10}, "a/0000", "d" * 16, "", 20.0, 1e12)
    nodes = {0: "n0", 1: "n1"}

    assert set(verdicts(data_rows([Answer(fine), Answer(fine)], nodes)).values()) == {"ok"}
    for other, what in (
        (replace(fine, files={"unet.safetensors": None}), "weights"),
        (replace(fine, chunk_digest="e" * 16), "chunk"),
        (replace(fine, chunk_problem="ChunkError: 1 shards are missing"), "chunk"),
    ):
        assert verdicts(data_rows([Answer(fine), Answer(other)], nodes))[what] == "fail"
    slow = replace(fine, flops_per_second=5e11)
    assert verdicts(data_rows([Answer(fine), Answer(fine), Answer(slow)], {**nodes, 2: "n2"}))["compute"] == "warn"


# --- the table ---


def test_the_table_shows_what_to_do_and_the_code_says_whether_something_failed():
    rows = Row("disk", "1 GB free", "2 GB", "fail", "delete something"), Row("lock", "one winner", "one winner")

    report = Report(rows)

    assert "→ delete something" in report.text()
    assert report.text().endswith("1 ok, 0 to think about, 1 failed")
    assert (report.code, report.values()["code"], Report(rows[1:]).code) == (3, 3, 0)
    assert listing([5, 0, 1, 2]) == "0–2, 5"
