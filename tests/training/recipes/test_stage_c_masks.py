"""The loss of stage C under a mask, against arithmetic by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from scripts.demo_models.stage_c import make_stage_c_models
from training.chunk_data import Batch
from training.config import RunConfig
from training.randomness import SampleIdentity
from training.recipes.stage_c import StageC

HEIGHT, WIDTH = 64, 96


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    paths = make_stage_c_models(tmp_path_factory.mktemp("models"), seed=0)
    models = {"network": "stage_c", "text_encoder": "text_encoder", "tokenizer": "tokenizer", "effnet": "effnet"}
    config = RunConfig.model_validate(
        {
            "name": "masks", "data": {"workspace": "none"}, "optimizer": {"learning_rate": 1e-5},
            "stage_c": {key: str(paths[name]) for key, name in models.items()} | {"train_text_encoder": False},
        }
    )  # fmt: skip
    made = StageC(config)
    made.load(torch.device("cpu"))
    return made


@pytest.fixture(scope="module")
def batch():
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.integers(0, 256, (2, 3, HEIGHT, WIDTH), dtype=np.uint8))
    identities = [SampleIdentity(seed=1, epoch=0, chunk="c", key=key) for key in "ab"]
    return Batch(
        step=0, number=0, is_padding=False, images=images, captions=["a", "b"], identities=identities,
        loss_weights=torch.ones(2), is_broken=torch.zeros(2, dtype=torch.bool), broken=[], datasets=["d", "d"],
        original_sizes=[(WIDTH, HEIGHT)] * 2, crops=[(0, 0)] * 2,
    )  # fmt: skip


def losses(recipe, batch):
    with torch.no_grad():
        return recipe.loss(recipe.trainable().eval(), batch).per_sample


def with_mask(batch, cells):
    """cells: (2, 3) of one image, the same for both."""
    pixels = np.kron(np.array(cells, np.uint8), np.ones((32, 32), np.uint8))
    return replace(batch, masks=torch.from_numpy(pixels).expand(2, 1, HEIGHT, WIDTH))


def test_a_white_mask_changes_nothing_and_a_black_one_leaves_no_loss(recipe, batch):
    plain = losses(recipe, batch)

    assert torch.equal(losses(recipe, with_mask(batch, [[255] * 3] * 2)), plain)
    assert losses(recipe, with_mask(batch, [[0] * 3] * 2)).tolist() == [0, 0]
    assert (plain > 0).all()


def test_losses_of_single_cells_sum_up_to_the_whole(recipe, batch):
    alone = []
    for cell in range(6):
        mask = np.zeros(6)
        mask[cell] = 255
        alone.append(losses(recipe, with_mask(batch, mask.reshape(2, 3))))

    assert torch.allclose(sum(alone), losses(recipe, batch), rtol=1e-5)
    assert len({round(float(one[0]), 6) for one in alone}) == 6
    grey = losses(recipe, with_mask(batch, [[51, 0, 102], [0, 255, 0]]))
    assert torch.allclose(grey, 0.2 * alone[0] + 0.4 * alone[2] + alone[4], rtol=1e-5)
