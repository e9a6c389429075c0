"""From a run's config to the optimizer of a recipe's module: freeze, split into parts, choose what decays, wrap."""

import logging
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from training.config import RunConfig
from training.optim.one_by_one import OneByOne
from training.optim.selection import freeze, split_parts, undecayed
from training.optimizers import make_optimizer

logger = logging.getLogger(__name__)


def optimizer_from_config(
    config: RunConfig,
    module: nn.Module,
    parts: Callable[[], Mapping[str, Iterable[nn.Parameter]]],
    *,
    learning_rates: Mapping[str, float],
) -> torch.optim.Optimizer:
    """Freeze what the config names in `module`, log it, and return the optimizer of the rest.

    parts: the recipe's, asked after freezing. Call it when weights have their format and before the engine prepares
    them. Raises PatternError, MissingPackageError, ValueError.
    """
    settings, precision = config.optimizer, config.precision
    if settings.freeze:
        logger.info("%s", freeze(module, settings.freeze))
    names = {parameter: name for name, parameter in module.named_parameters()}
    own = {part.name: part.parameters for part in settings.parts}
    own_rates = {part.name: part.learning_rate for part in settings.parts}
    optimizer = make_optimizer(
        settings.name,
        split_parts(parts(), names, own),
        learning_rates={**learning_rates, **own_rates},
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        undecayed=undecayed(names, settings.no_decay, decay_vectors=settings.decay_vectors),
        adafactor_eps=settings.adafactor_eps,
        adafactor_clip_threshold=settings.adafactor_clip_threshold,
        prodigy_d_coef=settings.prodigy_d_coef,
        prodigy_bias_correction=settings.prodigy_bias_correction,
        prodigy_safeguard_warmup=settings.prodigy_safeguard_warmup,
    )
    if precision.weights == "fp32" and not settings.fused_backward:
        return optimizer
    return OneByOne(optimizer, names, seed=config.seed, rounding=precision.weight_rounding)
