"""The engine that a run's settings and its launcher ask for."""

import torch
from accelerate import Accelerator

from training.config import RunConfig
from training.engines.base import Engine
from training.engines.fused import FusedEngine
from training.engines.plain import PlainEngine
from training.engines.scaled import ScaledEngine
from training.optim.loss_scale import LossScale


def make_engine(config: RunConfig, *, device: torch.device, exact: bool) -> Engine:
    """Return the engine of this launch. exact: gradients are reduced in a fixed order.

    Raises ValueError when the settings ask for what several processes cannot do.
    """
    mixed_precision = "bf16" if config.precision.autocast == "bf16" else "no"
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=mixed_precision)
    if config.optimizer.fused_backward:
        return FusedEngine(accelerator, exact=exact)
    if config.precision.autocast == "fp16":
        return ScaledEngine(accelerator, exact=exact, loss_scale=LossScale())
    return PlainEngine(accelerator, exact=exact)
