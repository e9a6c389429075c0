"""The engine that a run's settings and its launcher ask for."""

import torch
from accelerate import Accelerator

from training.config import RunConfig
from training.engines.base import Engine
from training.engines.plain import PlainEngine


def make_engine(config: RunConfig, *, device: torch.device, exact: bool) -> Engine:
    """Return the engine of this launch. exact: gradients are reduced in a fixed order."""
    mixed_precision = "no" if config.precision.autocast == "no" else "bf16"
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=mixed_precision)
    return PlainEngine(accelerator, exact=exact)
