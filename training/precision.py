"""Devices, thread counts and determinism of a training process."""

import os

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """Return the device for "auto", "cpu" or "cuda". Raises ValueError when a GPU is asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError('device "cuda": torch sees no GPU here; use device = "cpu" or check the driver')
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def set_exact(*, exact: bool, num_threads: int | None) -> int:
    """Pin the number of CPU threads and, in exact mode, choose deterministic kernels. Returns the thread count.

    Sums split over threads depend on their number, so exact mode without a number uses OMP_NUM_THREADS or 1.
    """
    if num_threads is None and "OMP_NUM_THREADS" in os.environ:
        num_threads = int(os.environ["OMP_NUM_THREADS"])
    if num_threads is None and exact:
        num_threads = 1
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if exact:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=False)
        torch.backends.cudnn.benchmark = False
    return torch.get_num_threads()
