"""The launch doctor in real processes: two that Slurm would put on two nodes, and one whose partner never comes."""

import json
import socket

import pytest

from scripts.tiny_run import Launch

pytestmark = pytest.mark.slow


def launch(run, log, rank, port, *extra):
    environment = {
        "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "ACCELERATE_USE_CPU": "true",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "SLURMD_NODENAME": f"n{rank}",
    }  # fmt: skip
    return Launch(run.arguments("doctor-launch", *extra), log, environment=environment)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_on_two_nodes_make_one_table(make_run, tmp_path):
    run, report, port = make_run(tmp_path / "run"), tmp_path / "doctor.json", free_port()

    extra = ("--processes", "2", "--json", str(report))
    launches = [launch(run, tmp_path / f"{rank}.log", rank, port, *extra) for rank in range(2)]
    codes = [one.wait() for one in launches]

    assert codes == [0, 0], launches[0].log.read_text()
    rows = {row["what"]: row for row in json.loads(report.read_text())["rows"]}
    assert [name for name, row in rows.items() if row["verdict"] == "fail"] == []
    assert {"round trip", "bandwidth", "clocks", "memory", "disk", "decoding", "exchange"} <= set(rows)
    assert rows["processes"]["found"] == "2 of 2 nodes: 1 on n0; 1 on n1"
    assert rows["run folder"]["found"].startswith("2 nodes see it")
    assert "2 of 2 nodes" in launches[0].log.read_text()
    assert "2 of 2 nodes" not in launches[1].log.read_text()
    assert not run.root.exists()  # nothing was trained or left behind


def test_a_rank_that_never_comes_is_named_and_the_code_is_3(make_run, tmp_path):
    log = tmp_path / "0.log"

    code = launch(make_run(tmp_path / "run"), log, 0, free_port(), "--timeout", "1").wait()

    assert code == 3
    assert "rank 1 of node number 1: did not come" in log.read_text()
