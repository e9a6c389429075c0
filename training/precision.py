"""Devices, number formats, thread counts and determinism of a training process."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from training.lora.frozen_base import frozen_base

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


def set_weights(module: nn.Module, name: str) -> None:
    """Give every floating parameter of a module the format "fp32", "bf16" or "fp16"; buffers keep theirs.

    So does the base below adapters. Parameters stay the same objects. Raises ValueError, naming the parameter, when a
    value is too large for fp16.
    """
    dtype, base = DTYPES[name], frozen_base(module)
    for parameter_name, parameter in module.named_parameters():
        if not parameter.is_floating_point() or parameter.dtype == dtype or parameter_name in base:
            continue
        converted = parameter.detach().to(dtype)
        if name == "fp16" and bool((torch.isinf(converted) & torch.isfinite(parameter)).any()):
            largest = float(parameter.detach().abs().max())
            raise ValueError(
                f'precision.weights "fp16": {parameter_name} holds {largest:.6g}, more than 65504; use "bf16"'
            )
        parameter.data = converted


def total_norm(gradients: Sequence[Tensor]) -> float:
    """Return the 2-norm of all gradients, summed in fp32 whatever their format; 0 for none."""
    if not gradients:
        return 0.0
    if gradients[0].is_cuda:
        norms = torch._foreach_norm(list(gradients), 2.0, dtype=torch.float32)
    else:
        norms = tuple(torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients)
    return float(torch.linalg.vector_norm(torch.stack(norms)))
