"""Put other weights into a module for a while, and give it back bit for bit.

Previews, validation and exports may show other weights than those trained: a running average, or schedule-free's. A
state is always saved outside: it holds the trained ones.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter


def local(tensor: Tensor) -> Tensor:
    """Return the memory that this process holds of a tensor: a distributed one's shard, else all of it."""
    shard: Tensor = tensor.detach()
    return shard.to_local() if hasattr(shard, "to_local") else shard


@contextmanager
def kept_aside(parameters: Iterable[Parameter]) -> Iterator[None]:
    """Keep a copy of the parameters in CPU memory, and put it back at the end, whatever happens."""
    aside = [(parameter, local(parameter).to("cpu", copy=True)) for parameter in parameters]
    try:
        yield
    finally:
        for parameter, value in aside:
            local(parameter).copy_(value)


@contextmanager
def schedule_free_average(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Show schedule-free's averaged weights instead of those where gradients are taken; do nothing for others.

    Its own `eval` and `train` would do, but for rounding: a preview would then change what is trained.
    """
    if not any("train_mode" in group for group in optimizer.param_groups):
        yield
        return
    with kept_aside(p for group in optimizer.param_groups for p in group["params"]):
        optimizer.eval()  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for group in optimizer.param_groups:
                group["train_mode"] = True
