import numpy as np
import pytest
import torch

from training.loading.batch import Batch


def batch_with(masks):
    size = 1 if masks is None else len(masks)
    return Batch(
        step=0, number=0, is_padding=False, images=torch.zeros(size, 3, 64, 96, dtype=torch.uint8), captions=[],
        identities=[], loss_weights=torch.ones(size), is_broken=torch.zeros(size, dtype=torch.bool), broken=[],
        datasets=[], original_sizes=[], crops=[], masks=masks,
    )  # fmt: skip


def test_a_mask_at_latent_size_is_the_mean_over_each_cell():
    masks = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 1, 64, 96), dtype=np.uint8))

    weights = batch_with(masks).mask_at(2, 3)

    assert weights.shape == (2, 1, 2, 3)
    for image in range(2):
        for row in range(2):
            for column in range(3):
                cell = masks[image, 0, row * 32 : row * 32 + 32, column * 32 : column * 32 + 32].numpy()
                assert weights[image, 0, row, column].item() == pytest.approx(cell.mean() / 255, abs=1e-6)


def test_a_batch_without_masks_has_no_weights():
    assert batch_with(None).mask_at(2, 3) is None


def test_a_latent_whose_cells_are_no_whole_pixels_is_refused():
    masks = torch.zeros(1, 1, 64, 96, dtype=torch.uint8)

    with pytest.raises(ValueError, match="96x64 pixels cannot be averaged to 5x2"):
        batch_with(masks).mask_at(2, 5)
