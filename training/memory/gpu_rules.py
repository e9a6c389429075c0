"""What a GPU does with a network's calls, for networks on the meta device, which has neither autocast nor kernels.

Autocast: matrix products in bf16 with casts of trained weights kept until the forward ends, norms in fp32
(torch's lists for CUDA). Attention: one fused kernel that keeps q, k, v, its output and one number per row.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_IN_BF16 = {F.linear, torch.conv2d, F.conv2d, torch.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__}
_IN_FP32 = {F.layer_norm, torch.layer_norm, F.softmax, torch.softmax}


class GpuRules(TorchFunctionMode):
    """Active around the forward pass; blocks that are computed again in the backward pass need `around`.

    fused_attention off gives the long way, with attention probabilities: torch's on a CPU when there is dropout.
    """

    def __init__(self, *, autocast: bool, fused_attention: bool) -> None:
        super().__init__()
        self.autocast = autocast
        self.fused_attention = fused_attention
        self._casts: dict[int, Tensor] = {}
        self._is_backward = False

    @contextmanager
    def off(self) -> Iterator[None]:
        """Run without autocast."""
        was, self.autocast = self.autocast, False
        try:
            yield
        finally:
            self.autocast = was

    def end_forward(self) -> None:
        """Drop the cached casts, as leaving the autocast context does; what backward needs lives on."""
        self._casts.clear()
        self._is_backward = True

    def around(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return `function`, which is a checkpointed block's, under these rules also when backward calls it again."""

        def under_rules(*args: Any, **kwargs: Any) -> Tensor:
            with self if self._is_backward else nullcontext():
                return function(*args, **kwargs)

        return under_rules

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.fused_attention:
            return self._attention(*args, **kwargs)
        if self.autocast and func in _IN_BF16:
            args = tuple(self._cast(value) for value in args)
            kwargs = {name: self._cast(value) for name, value in kwargs.items()}
        elif self.autocast and func in _IN_FP32:
            args = tuple(value.float() if isinstance(value, Tensor) else value for value in args)
        return func(*args, **kwargs)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, *_: Any, dropout_p: float = 0.0, **kwargs: Any) -> Tensor:
        q, k, v = (self._cast(each) if self.autocast else each for each in (q, k, v))
        # A mask changes what is computed, not what is kept.
        mixed: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p)[0]
        return mixed

    def _cast(self, value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.dtype == torch.float32):
            return value
        if not (isinstance(value, nn.Parameter) and value.requires_grad):
            return value.to(torch.bfloat16)
        if (cached := self._casts.get(id(value))) is None:
            cached = value.to(torch.bfloat16)
            if torch.is_grad_enabled() and not self._is_backward:
                self._casts[id(value)] = cached
        return cached
