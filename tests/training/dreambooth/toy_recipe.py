"""The recipe dreambooth on toy models: folders of SD 1, SD 2 and SDXL, batches of noise, losses and steps."""

import copy
from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler

from tests.training.dreambooth.toy_sd import toy_text, toy_unet
from tests.training.toy import toy_config
from training.chunk_data import Batch
from training.optim.from_config import optimizer_from_config
from training.randomness import SampleIdentity
from training.recipes import dreambooth
from training.recipes.dreambooth import DreamBooth
from training.stages import stage_config

FAMILIES = ("sd1", "sd2", "sdxl")
HEIGHT, WIDTH = 64, 96
LONG = "a girl with a hat, " * 20
"""More than 75 tokens."""


def save_model(folder, family, *, scheduler=None, vae=None):
    """Write a diffusers folder. scheduler, vae: changes of their settings."""
    torch.manual_seed(1)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    parts = {
        "unet": toy_unet(family, layers_per_block=1),
        "vae": AutoencoderKL(
            block_out_channels=(32,) * 4, latent_channels=4, layers_per_block=1, **{**blocks, **(vae or {})}
        ),
        "text_encoder": toy_text(act="gelu" if family == "sd2" else "quick_gelu"),
    }
    if family == "sdxl":
        parts["text_encoder_2"] = toy_text(projection=True, act="gelu")
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    DDIMScheduler(**{**settings, **(scheduler or {})}).save_pretrained(folder / "scheduler")
    return folder


def sd_config(folder, *, tables=None, **recipe):
    """Return a RunConfig. tables: of the run, besides [dreambooth]; recipe: keys of [dreambooth]."""
    changes = {"precision": {"autocast": "no"}, "optimizer": {"learning_rate": 1e-3}, **(tables or {})}
    return toy_config(stage_c=None, **changes, dreambooth={"model": str(folder), **recipe})


def load_recipe(config, *, chunk=None, source=None):
    """Return a loaded recipe; of a stage where its chunk is given. source: of `load_model`, in place of the files."""
    made = DreamBooth(config if chunk is None else stage_config(config, chunk))
    with nullcontext() if source is None else patch.object(dreambooth, "load_model", lambda _: copy.deepcopy(source)):
        made.load(torch.device("cpu"))
    return made


def sd_batch(captions=("rin, a girl", "a castle"), *, classes=(), epoch=0, keys=None, seed=0):
    """Return pictures of noise, one per caption, whose sizes and crops differ. classes: slots of class images."""
    size = len(captions)
    pixels = np.random.default_rng(seed).integers(0, 256, (size, 3, HEIGHT, WIDTH), dtype=np.uint8)
    keys = keys or [chr(ord("a") + number) for number in range(size)]
    identities = [
        SampleIdentity(seed=1, epoch=epoch, chunk="c", key=key, concept="rin/class" if slot in classes else "rin")
        for slot, key in enumerate(keys)
    ]
    return Batch(
        step=0, number=0, is_padding=False, images=torch.from_numpy(pixels), captions=list(captions),
        identities=identities, loss_weights=torch.ones(size), is_broken=torch.zeros(size, dtype=torch.bool), broken=[],
        datasets=["rin"] * size, original_sizes=[(200 + slot, 100 + 3 * slot) for slot in range(size)],
        crops=[(5 * slot, slot) for slot in range(size)],
    )  # fmt: skip


def part_of(batch, slots):
    """Return a batch of some of its samples."""
    return replace(
        batch, images=batch.images[slots], loss_weights=batch.loss_weights[slots], is_broken=batch.is_broken[slots],
        **{
            name: [getattr(batch, name)[slot] for slot in slots]
            for name in ("captions", "identities", "datasets", "original_sizes", "crops")
        },
    )  # fmt: skip


def losses_of(recipe, batch, **more):
    """Return the unweighted losses (B,) without gradient."""
    with torch.no_grad():
        return recipe.loss(recipe.trainable(), batch, **more).per_sample


def weighted(recipe, batch):
    """Return the step's loss, (1/N) Σ w L, with gradient."""
    loss = recipe.loss(recipe.trainable(), batch)
    return (loss.weights * batch.loss_weights * loss.per_sample).sum() / len(batch.captions)


def optimizer_of(recipe, config):
    return optimizer_from_config(config, recipe.trainable(), recipe.parts, learning_rates=recipe.learning_rates())


def train_step(recipe, config, *batches, optimizer=None):
    """Make one update from batches that are micro-batches of a step; return the optimizer."""
    optimizer = optimizer or optimizer_of(recipe, config)
    num_images = sum(len(batch.captions) for batch in batches)
    optimizer.zero_grad()
    for batch in batches:
        (weighted(recipe, batch) * len(batch.captions) / num_images).backward()
    optimizer.step()
    return optimizer


def weights_of(recipe):
    """Return copies of all weights of the trainable module."""
    return {name: tensor.detach().clone() for name, tensor in recipe.trainable().state_dict().items()}


def moved(before, after):
    """Return the names of weights that differ."""
    assert set(before) == set(after)
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
