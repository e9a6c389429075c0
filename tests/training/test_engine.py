"""Several processes: gradients, losses and tables equal those of one, with both ways of bringing them together."""

import multiprocessing
import os
import socket

import pytest
import torch

from tests.training.toy import run_toy, toy_config, toy_plan

PRELOAD = ["tests.training.toy"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _train(rank: int, world_size: int, port: int, options: dict, path: str) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    torch.set_num_threads(1)
    run = run_toy(toy_config(), **options)
    torch.save(vars(run) | {"rank": rank}, f"{path}.{rank}")
    torch.distributed.destroy_process_group()


def train_on(world_size: int, path, **options) -> list[dict]:
    """Train the toy run on several processes and return what came of it on each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    port = _free_port()
    processes = [
        context.Process(target=_train, args=(rank, world_size, port, options, str(path))) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * world_size
    return [torch.load(f"{path}.{rank}", weights_only=False) for rank in range(world_size)]


@pytest.mark.parametrize("exact", [pytest.param(True, marks=pytest.mark.slow), False], ids=["exact", "ddp"])
def test_two_processes_have_the_gradients_of_one(tmp_path, exact):
    config = toy_config()
    broken = (toy_plan(config).steps[0].micro_batches[0].samples[0].key,)  # in the micro-batch that padding repeats
    alone = run_toy(config, broken=broken, adaptive=True)

    both = train_on(2, tmp_path / "run", exact=exact, broken=broken, adaptive=True)

    assert len(both[0]["gradients"]) == len(alone.gradients) == 3
    for run in both:
        for ours, theirs in zip(run["gradients"], alone.gradients, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
        assert run["position"].__dict__ | {"chunk_busy_seconds": 0} == alone.position.__dict__ | {
            "chunk_busy_seconds": 0
        }
        torch.testing.assert_close(run["table"], alone.table, rtol=1e-6, atol=0)
        assert run["recorder"].events == alone.recorder.events
        for row, expected in zip(run["recorder"].traces, alone.recorder.traces, strict=True):
            assert [sample[0] for sample in row["samples"]] == [sample[0] for sample in expected["samples"]]
            losses = [sample[3] for sample in expected["samples"]]
            assert [sample[3] for sample in row["samples"]] == pytest.approx(losses, rel=1e-6)
    assert torch.equal(both[0]["weights"]["0.weight"], both[1]["weights"]["0.weight"])


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_rank_stops_the_update_on_all(tmp_path):
    config = toy_config()
    nan_key = toy_plan(config).steps[1].micro_batches[1].samples[0].key  # rank 1 alone has it

    both = train_on(2, tmp_path / "run", nan_keys=(nan_key,))

    for run in both:
        assert [event[:2] for event in run["recorder"].events] == [("skipped", 1)]
        assert run["position"].applied_updates == 2
    assert torch.equal(both[0]["weights"]["0.weight"], both[1]["weights"]["0.weight"])
    assert torch.isfinite(both[0]["weights"]["0.weight"]).all()
