import logging
import os
import signal

import pytest

from tests.training.chunks import make_chunk, make_data, make_plan
from training.chunk_data import make_loader
from training.errors import LostWorkerError
from training.exit_codes import FAILED, code_of, is_foreseen

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the signals of Unix")


@pytest.fixture(scope="module")
def chunk(tmp_path_factory):
    return make_chunk(tmp_path_factory.mktemp("chunks") / "newest" / "0000")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """torch looks after its workers only when none has given anything for so long; 5 s by itself."""
    from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.3,))


def content(batch):
    return batch.step, batch.number, batch.images.numpy().tobytes(), batch.captions, batch.loss_weights.tolist()


def test_a_killed_worker_costs_a_warning_and_no_batch(chunk, caplog):
    plan = make_plan(chunk, micro_batch_size=1)
    data = make_data(chunk, plan)
    expected = [content(data[item]) for item in range(len(data))]

    loader = make_loader(data, workers=2, prefetch=1)
    given = [content(next(loader)) for _ in range(3)]
    with caplog.at_level(logging.WARNING):
        for pid in loader.worker_pids:
            os.kill(pid, signal.SIGKILL)
        given += [content(batch) for batch in loader]

    assert given == expected
    assert "SIGKILL, as the kernel sends it when memory runs out" in caplog.text
    assert "1 of 3 times" in caplog.text


@pytest.mark.slow
def test_workers_that_are_killed_again_and_again_end_the_launch(chunk, monkeypatch):
    monkeypatch.setattr("training.loading.workers.MAX_RESTARTS", 1)
    loader = make_loader(make_data(chunk, make_plan(chunk, micro_batch_size=1)), workers=1, prefetch=1)

    with pytest.raises(LostWorkerError, match=r"lower data.workers or data.prefetch .* state is intact") as error:
        for _ in loader:
            os.kill(loader.worker_pids[0], signal.SIGKILL)

    assert (code_of(error.value), is_foreseen(error.value)) == (FAILED, True)
    assert list(loader) == []


class Failing:
    """Data with a fault of ours."""

    def __len__(self):
        return 2

    def __getitem__(self, item):
        raise RuntimeError("a fault of ours")


@pytest.mark.parametrize("workers", [0, 1])
def test_other_errors_are_no_reason_to_start_workers_again(workers):
    with pytest.raises(RuntimeError, match="a fault of ours"):
        list(make_loader(Failing(), workers=workers))
