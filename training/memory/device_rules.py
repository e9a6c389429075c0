"""What a device does with a network's calls, for networks on the meta device, which has neither autocast nor kernels.

Autocast: matrix products in 16 bits with casts of trained weights kept until the forward ends; norms in fp32 on a GPU,
in the format of their input on a CPU (torch's lists). Attention: one fused kernel that keeps q, k, v, its output and
one number per row; on a CPU with dropout the long way, which keeps probabilities. Dropout keeps one byte per element on
a GPU, a factor in the input's format on a CPU.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_IN_BF16 = {
    F.linear, torch.conv2d, F.conv2d, torch.bmm, torch.baddbmm, torch.matmul, Tensor.matmul, Tensor.__matmul__,
}  # fmt: skip
_IN_FP32_ON_GPU = {
    F.layer_norm, torch.layer_norm, F.group_norm, torch.group_norm, F.softmax, torch.softmax, Tensor.softmax,
}  # fmt: skip


Device = Literal["gpu", "cpu"]


class DeviceRules(TorchFunctionMode):
    """Active around the forward pass; blocks that are computed again in the backward pass need `around`."""

    def __init__(self, device: Device, *, autocast: bool) -> None:
        super().__init__()
        self.autocast = autocast
        self._is_gpu = device == "gpu"
        self._casts: dict[int, Tensor] = {}
        self._is_backward = False

    @contextmanager
    def switched(self, *, autocast: bool) -> Iterator[None]:
        """Run with or without autocast."""
        was, self.autocast = self.autocast, autocast
        try:
            yield
        finally:
            self.autocast = was

    def off(self) -> AbstractContextManager[None]:
        """Run without autocast."""
        return self.switched(autocast=False)

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
        if func is F.scaled_dot_product_attention and (self._is_gpu or not kwargs.get("dropout_p")):
            return self._attention(*args, **kwargs)
        if func is F.dropout and self._is_gpu:
            return self._dropout(*args, **kwargs)
        if self.autocast and func in _IN_BF16:
            args = tuple(self._cast(value) for value in args)
            kwargs = {name: self._cast(value) for name, value in kwargs.items()}
        elif self.autocast and self._is_gpu and func in _IN_FP32_ON_GPU:
            args = tuple(value.float() if isinstance(value, Tensor) else value for value in args)
        return func(*args, **kwargs)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, *_: Any, dropout_p: float = 0.0, **kwargs: Any) -> Tensor:
        q, k, v = (self._cast(each) if self.autocast else each for each in (q, k, v))
        # A mask changes what is computed, not what is kept.
        mixed: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p)[0]
        return mixed

    def _dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        dropped: Tensor = torch.native_dropout(x, p, True)[0] if training and p else x
        return dropped

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
