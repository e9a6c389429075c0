"""A small stage C recipe and batches for it: the demo's random models, without files of pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.training.toy import toy_config
from training.chunk_data import Batch
from training.config import RunConfig
from training.randomness import SampleIdentity
from training.recipes.stage_c import StageC

HEIGHT, WIDTH = 64, 96


def small_config(paths: dict[str, Path], **stage_c: Any) -> RunConfig:
    """paths: of `make_stage_c_models`; stage_c: settings of the recipe."""
    files = {"network": "stage_c", "text_encoder": "text_encoder", "effnet": "effnet", "previewer": "previewer"}
    models = {key: str(paths[name]) for key, name in files.items()}
    return toy_config(stage_c={**models, **stage_c})


def small_recipe(paths: dict[str, Path], **stage_c: Any) -> StageC:
    """Return a loaded recipe."""
    made = StageC(small_config(paths, **stage_c))
    made.load(torch.device("cpu"))
    return made


def small_batch(captions: tuple[str, ...] = ("a cat", "a dog"), *, seed: int = 0, epoch: int = 0) -> Batch:
    """Return pictures of noise, one per caption; keys are a, b, …"""
    size = len(captions)
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (size, 3, HEIGHT, WIDTH), dtype=np.uint8)
    keys = [chr(ord("a") + number) for number in range(size)]
    return Batch(
        step=0, number=0, is_padding=False, images=torch.from_numpy(pixels), captions=list(captions),
        identities=[SampleIdentity(seed=1, epoch=epoch, chunk="c", key=key) for key in keys],
        loss_weights=torch.ones(size), is_broken=torch.zeros(size, dtype=torch.bool), broken=[],
        datasets=["d"] * size, original_sizes=[(WIDTH, HEIGHT)] * size, crops=[(0, 0)] * size,
    )  # fmt: skip


def losses(recipe: StageC, batch: Batch, *, train: bool = False, **more: Any) -> Tensor:
    """Return the unweighted losses (B,), in eval mode or with dropout of a fixed seed."""
    torch.manual_seed(0)
    with torch.no_grad():
        return recipe.loss(recipe.trainable().train(train), batch, **more).per_sample
