import pytest
import torch

from training.precision import choose_device, set_exact


def test_a_gpu_that_is_not_there_is_an_error_and_auto_takes_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match='device "cuda": torch sees no GPU here'):
        choose_device("cuda")


@pytest.fixture
def own_settings():
    """Put the process's threads and kernels back after the test."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.mark.parametrize(
    "environment, exact, num_threads, expected",
    [(None, True, None, 1), ("2", True, None, 2), ("2", False, 3, 3)],
)
def test_exact_mode_pins_threads_and_kernels(own_settings, monkeypatch, environment, exact, num_threads, expected):
    monkeypatch.setenv("OMP_NUM_THREADS", environment or "")
    if environment is None:
        monkeypatch.delenv("OMP_NUM_THREADS")

    assert set_exact(exact=exact, num_threads=num_threads) == torch.get_num_threads() == expected
    assert torch.are_deterministic_algorithms_enabled() or not exact


def test_threads_are_left_alone_when_nothing_asks_for_a_number(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()

    assert set_exact(exact=False, num_threads=None) == before
