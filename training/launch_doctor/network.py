"""all_reduce over the processes as training makes them: is the sum right, how long does it take, how fast is it.

Through accelerate, so that what it makes of the launcher's settings is what training would get.
"""

import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from sharding.files import size_text
from training.launch_doctor.report import Row, listing
from training.launch_doctor.team import Answer

_SIZES = (1 << 20, 16 << 20, 64 << 20)
_ROUND_TRIPS, _REPEATS = 20, 3
_SLOW_BYTES_PER_SECOND = 1e9
"""Between GPUs: an all_reduce slower than this is what a wrong network interface looks like."""


@dataclass(frozen=True)
class Network:
    """One rank's measurements. speeds: (bytes, bytes a second) of all_reduce, by the ring's account."""

    believed: int
    """Processes that accelerate sees."""
    backend: str
    is_right: bool
    round_trip_seconds: float
    speeds: Sequence[tuple[int, float]]


def measure_network(device: torch.device, *, timeout_seconds: float) -> Network:
    """Connect all ranks and measure; every rank has to call it."""
    timeout = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_seconds))
    accelerator = Accelerator(cpu=device.type == "cpu", kwargs_handlers=[timeout])
    if accelerator.num_processes == 1:
        return Network(1, "", True, 0.0, ())
    place, world = accelerator.device, accelerator.num_processes
    numbers = torch.arange(1024, dtype=torch.float32, device=place)
    shared = numbers * (accelerator.process_index + 1)
    dist.all_reduce(shared)
    is_right = torch.equal(shared.cpu(), torch.arange(1024, dtype=torch.float32) * (world * (world + 1) // 2))
    trip = statistics.median(_seconds(torch.ones(1, device=place)) for _ in range(_ROUND_TRIPS))
    speeds = []
    for size in _SIZES:
        tensor = torch.zeros(size // 4, device=place)
        best = min(_seconds(tensor) for _ in range(_REPEATS))
        speeds.append((size, 2 * (world - 1) / world * size / best))  # a ring sends every byte 2 (n - 1) / n times
    return Network(world, str(dist.get_backend()), is_right, trip, speeds)


def network_rows(answers: Sequence[Answer[Network]]) -> Iterator[Row]:
    """Yield rows about the connection. Answers: of all ranks, by rank."""
    problems = {rank: answer.problem for rank, answer in enumerate(answers) if answer.value is None}
    if problems:
        first = min(problems)
        yield Row(
            "round trip", f"rank {listing(list(problems))}: {problems[first].splitlines()[0][:200]}",
            "all_reduce over all ranks", "fail",
            "NCCL_DEBUG=INFO says which interface is taken; NCCL_SOCKET_IFNAME / GLOO_SOCKET_IFNAME choose another",
        )  # fmt: skip
        return
    found = [answer.value for answer in answers if answer.value is not None]
    if alone := [rank for rank, one in enumerate(found) if one.believed != len(found)]:
        yield Row(
            "round trip", f"rank {listing(alone)} of {len(found)} believe to be one of {found[alone[0]].believed}",
            f"one of {len(found)}", "fail",
            "on CPUs set ACCELERATE_USE_CPU=true and do not use `accelerate launch --cpu`",
        )  # fmt: skip
        return
    if len(found) > 1:
        yield from _connected_rows(found)


def slowest(answers: Sequence[Answer[Network]]) -> float | None:
    """Return bytes a second of the largest all_reduce on the slowest rank; None for one process."""
    speeds = [answer.value.speeds[-1][1] for answer in answers if answer.value is not None and answer.value.speeds]
    return min(speeds, default=None)


def _connected_rows(found: Sequence[Network]) -> Iterator[Row]:
    wrong = [rank for rank, one in enumerate(found) if not one.is_right]
    trip, backend = max(one.round_trip_seconds for one in found), found[0].backend
    text = f"{backend}: all_reduce of one number {1000 * trip:.2f} ms"
    if wrong:
        advice = "sums arrive wrong: exclude the node (scontrol update nodename=… state=drain), look at cables and ECC"
        yield Row("round trip", f"{text}; the sum is wrong on rank {listing(wrong)}", "right sums", "fail", advice)
    else:
        is_slow = backend == "nccl" and trip > 0.01
        advice = "10 ms and more hint at a management network: set NCCL_SOCKET_IFNAME" * is_slow
        yield Row("round trip", f"{text}, right on all ranks", "right sums", "warn" if is_slow else "ok", advice)
    slow = [min(one.speeds[place][1] for one in found) for place in range(len(_SIZES))]
    parts = (f"{size_text(size)} {speed / 1e9:.2f} GB/s" for size, speed in zip(_SIZES, slow, strict=True))
    is_slow = backend == "nccl" and slow[-1] < _SLOW_BYTES_PER_SECOND
    yield Row(
        "bandwidth", ", ".join(parts), "over 1 GB/s between GPUs", "warn" if is_slow else "ok",
        "is InfiniBand or NVLink used (NCCL_DEBUG=INFO)? else parallel.shard = \"hybrid\", larger steps" * is_slow,
    )  # fmt: skip


def _seconds(tensor: torch.Tensor) -> float:
    dist.barrier(device_ids=[int(os.environ.get("LOCAL_RANK", "0"))] if tensor.is_cuda else None)
    start = time.perf_counter()
    dist.all_reduce(tensor)
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter() - start
