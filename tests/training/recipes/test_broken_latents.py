"""A picture that the recipe finds unusable while training: a weight-0 slot, told, counted, and the rest as if alone."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from tests.training.small_stage_c import losses, small_batch, small_recipe
from tests.training.toy import ListRecorder, ToyRecipe, WatchedEngine, run_toy, toy_batches, toy_config, toy_plan
from training.errors import BrokenDataError
from training.loop import train_epoch
from training.position import Position
from training.stage_c.latents import NOT_FINITE
from training.trained import Trained

BAD = ("0003", "0008")


class PickyRecipe(ToyRecipe):
    """Finds some samples broken, and has no number for their loss."""

    def loss(self, model, batch):
        made = super().loss(model, batch)
        slots = {slot: NOT_FINITE for slot, one in enumerate(batch.identities) if one.key in BAD}
        per_sample = torch.where(
            torch.tensor([slot in slots for slot in range(len(batch.captions))]), torch.nan, made.per_sample
        )
        return replace(made, per_sample=per_sample, broken=slots)


def train(config):
    engine, recipe, recorder = (
        WatchedEngine(Accelerator(cpu=True), exact=True),
        PickyRecipe(adaptive=True),
        ListRecorder(),
    )
    rate = config.optimizer.learning_rate
    groups = [{"params": list(recipe.module.parameters()), "lr": rate, "peak_rate": rate, "part": "network"}]
    optimizer = torch.optim.SGD(groups)
    plan = toy_plan(config)
    trained = Trained(recipe, engine, engine.prepare(recipe.module, optimizer), optimizer, {})
    position, _ = train_epoch(
        plan, toy_batches(plan), position=Position(chunk="toy/0000"), config=config, trained=trained, recorder=recorder
    )
    return position, recorder, engine.gradients, recipe.adaptive.state_dict()["losses"]


def test_it_is_the_same_as_a_picture_that_cannot_be_read():
    config = toy_config()
    unreadable = run_toy(config, adaptive=True, broken=BAD)

    position, recorder, gradients, table = train(config)

    told = sorted(image for event in recorder.events if event[0] == "broken" for image in event[2])
    assert told == [(key, NOT_FINITE) for key in BAD]
    assert position.chunk_images_broken == unreadable.position.chunk_images_broken == 2
    assert len(gradients) == len(unreadable.gradients) > 1
    for mine, theirs in zip(gradients, unreadable.gradients, strict=True):
        for gradient, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(gradient, other)
    assert torch.equal(table, unreadable.table)


def test_too_many_of_them_end_the_run():
    with pytest.raises(BrokenDataError, match=r"[12] of 14 images could not be read"):
        train(toy_config(data={"max_broken_fraction": 0.0}))


def test_stage_c_leaves_out_a_picture_whose_latents_are_not_finite(paths):
    recipe, batch = small_recipe(paths), small_batch()
    before = losses(recipe, batch)
    real = recipe._latents.effnet.encode
    white = (batch.images[1].float() / 255)[None]
    recipe._latents.effnet.encode = lambda rgb, **more: (
        real(rgb, **more) * (torch.nan if torch.equal(rgb, white) else 1)
    )

    made = recipe.loss(recipe.trainable().eval(), batch)

    marked = batch.without(made.broken)
    assert made.broken == {1: NOT_FINITE} and made.per_sample.isfinite().all()
    assert made.per_sample[0].item() == pytest.approx(before[0].item(), rel=1e-5)
    assert (marked.is_broken.tolist(), marked.loss_weights.tolist()) == ([False, True], [1, 0])
    assert marked.broken == [("b", NOT_FINITE)] and batch.broken == []
    assert replace(batch, is_padding=True).without(made.broken).broken == []
    assert marked.without(made.broken).broken == marked.broken  # told once
