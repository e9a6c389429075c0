"""The engine that a run's settings and its launcher ask for."""

import logging

import torch
from accelerate import Accelerator

from sharding.config import ConfigError
from training.config import RunConfig
from training.config.parallel import IN_PARTS, ParallelConfig, limits_table
from training.engines.base import Engine
from training.engines.deepspeed import ZeroEngine
from training.engines.fsdp import FsdpEngine
from training.engines.fused import FusedEngine
from training.engines.plain import PlainEngine
from training.engines.scaled import ScaledEngine
from training.optim.loss_scale import LossScale

logger = logging.getLogger(__name__)


def make_engine(config: RunConfig, *, device: torch.device, exact: bool) -> Engine:
    """Return the engine of this launch. exact: gradients are reduced in a fixed order.

    Raises ConfigError or ValueError when the settings ask for what several processes cannot do.
    """
    mixed_precision = "bf16" if config.precision.autocast == "bf16" else "no"
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=mixed_precision)
    parallel, num_processes = config.parallel, accelerator.num_processes
    if parallel.strategy == "single" and num_processes != 1:
        raise ConfigError(
            f'parallel.strategy "single": {num_processes} processes were started; use "ddp", or launch one'
        )
    if parallel.strategy in IN_PARTS:
        logger.info("what each parallel.strategy cannot do:\n%s", limits_table())
        return _in_parts(parallel, accelerator, exact=exact)
    if config.optimizer.fused_backward:
        return FusedEngine(accelerator, exact=exact)
    if config.precision.autocast == "fp16":
        return ScaledEngine(accelerator, exact=exact, loss_scale=LossScale())
    return PlainEngine(accelerator, exact=exact)


def _in_parts(parallel: ParallelConfig, accelerator: Accelerator, *, exact: bool) -> Engine:
    if parallel.strategy != "fsdp2":
        stage = int(parallel.strategy.removeprefix("zero"))
        return ZeroEngine(accelerator, exact=exact, stage=stage, offload=parallel.offload)
    if accelerator.num_processes == 1:
        logger.info('parallel.strategy "fsdp2": one process holds everything, as with "single"')
        return PlainEngine(accelerator, exact=exact)
    is_hybrid, once = parallel.shard == "hybrid", parallel.gradients_meet == "step"
    return FsdpEngine(accelerator, exact=exact, is_hybrid=is_hybrid, meets_once_per_step=once)
