"""What is loaded but never trained nor saved: the base below adapters.

A state then holds megabytes instead of gigabytes. It goes on only on the same base: the recipe's `frozen_digests` say
so.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def freeze_base(
    module: nn.Module, names: Iterable[str], *, dtype: torch.dtype | None = None, keeps_vectors: bool = False
) -> None:
    """Freeze parameters of `module`, and keep them out of its `state_dict`, which then loads without them, too.

    names: of parameters and buffers of the whole module, as it is now. dtype: the format to keep them in.
    keeps_vectors: norms and biases keep theirs; a norm in fp32 takes inputs of any format.
    """
    left_out = frozenset(names)
    for name, parameter in module.named_parameters():
        if name in left_out:
            parameter.requires_grad_(False)
            if dtype is not None and parameter.dtype != dtype and not (keeps_vectors and parameter.ndim < 2):
                parameter.data = parameter.data.to(dtype)
    module._frozen_base = left_out  # type: ignore[assignment]

    def leave_out(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        for name in left_out:
            state.pop(prefix + name, None)

    def not_missing(_: nn.Module, found: Any) -> None:
        found.missing_keys[:] = [name for name in found.missing_keys if name not in left_out]

    module.register_state_dict_post_hook(leave_out)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_post_hook(not_missing)  # type: ignore[no-untyped-call]


def frozen_base(module: nn.Module) -> frozenset[str]:
    """Return the names that `freeze_base` left out of states; empty where it was not called."""
    names: frozenset[str] = getattr(module, "_frozen_base", frozenset())
    return names
