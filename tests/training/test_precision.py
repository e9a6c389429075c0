import pytest
import torch

from training.precision import choose_device, set_exact, set_weights, total_norm


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


def test_weights_change_their_format_and_stay_the_same_objects():
    module = torch.nn.BatchNorm1d(3)
    before = list(module.parameters())

    set_weights(module, "bf16")

    assert [id(parameter) for parameter in module.parameters()] == [id(parameter) for parameter in before]
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert module.running_mean.dtype == torch.float32


def test_weights_too_large_for_fp16_are_named():
    module = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(module.weight, 70000.0)

    with pytest.raises(ValueError, match=r'precision\.weights "fp16": weight holds 70000, more than 65504'):
        set_weights(module, "fp16")


def test_the_norm_of_half_gradients_is_taken_in_fp32():
    halves = [torch.full((1000,), 60000.0, dtype=torch.float16), torch.full((10,), 3.0, dtype=torch.bfloat16)]

    assert total_norm(halves) == pytest.approx(60000 * 1000**0.5, rel=1e-3)
    assert total_norm([]) == 0.0
    wholes = [torch.randn(50), torch.randn(3, 4)]
    assert total_norm(wholes) == float(torch.nn.utils.get_total_norm(wholes))
