"""What the model predicted before it was trained: the target of class images with `prior_target = "base_model"`.

With adapters the networks below are the base, and adapters are passed over for a moment. Where whole networks are
trained, a frozen copy of them is kept beside them; it costs their memory once more.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from training.dreambooth.conditioning import Conditioning
from training.dreambooth.model import SdNetworks


class BaseModel:
    """Made before anything is trained or a state is loaded. has_adapters: the networks below them never change."""

    def __init__(self, model: SdNetworks, conditioning: Conditioning, *, has_adapters: bool) -> None:
        self._conditioning, self._has_adapters = conditioning, has_adapters
        self._model = model if has_adapters else copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def predict(self, noised: Tensor, t: Tensor, windows: tuple[Tensor, ...], time_ids: Tensor | None) -> Tensor:
        """Return what the base predicts (B, 4, h, w), fp32."""
        with passed_over(self._model) if self._has_adapters else _nothing():
            states = self._conditioning.states(windows) if self._model.text is None else None
            predicted: Tensor = self._model(noised, t, windows=windows, states=states, time_ids=time_ids)
        return predicted.float()


@contextmanager
def passed_over(module: nn.Module) -> Iterator[None]:
    """Compute without adapters for a moment; which parameters have gradients stays as it was."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _nothing() -> Iterator[None]:
    yield
