"""Count the bytes of live tensors, and their peak, while code runs on fake tensors: no memory is used.

Sees what torch's dispatcher sees: every tensor that an operation returns, until its storage is freed. It does not see
workspaces inside kernels, the allocator's rounding and fragmentation, or the context of a GPU.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count from 0 while active; `given` are tensors that were there before and count nothing."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._seen: set[int] = set()
        self._given = list(given)  # kept alive, so that no new storage can take an old one's place
        self._seen.update(tensor.untyped_storage()._cdata for tensor in self._given)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        identity = storage._cdata
        if identity in self._seen:
            return
        self._seen.add(identity)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, identity, storage.nbytes())

    def _freed(self, identity: int, num_bytes: int) -> None:
        self._seen.discard(identity)
        self.now -= num_bytes
