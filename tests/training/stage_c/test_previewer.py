"""The previewer: published shapes, output range, evaluation mode."""

import torch

from training.stage_c.previewer import (
    Previewer,
    PreviewerConfig,
    config_from_state_dict,
    load_previewer,
    save_previewer,
)

TINY = PreviewerConfig(widths=(16, 12, 8, 6))


def test_the_previewer_has_the_published_keys_and_shapes():
    shapes = {key: tuple(value.shape) for key, value in Previewer(PreviewerConfig()).state_dict().items()}

    assert shapes["blocks.0.weight"] == (512, 16, 1, 1)
    assert shapes["blocks.5.running_mean"] == (512,)
    assert shapes["blocks.6.weight"] == (512, 256, 2, 2)
    assert shapes["blocks.12.weight"] == (256, 128, 2, 2)
    assert shapes["blocks.18.weight"] == (128, 128, 2, 2)
    assert shapes["blocks.21.weight"] == (128, 128, 3, 3)
    assert shapes["blocks.24.weight"] == (3, 128, 1, 1)
    assert {int(key.split(".")[1]) for key in shapes} == {index for index in range(25) if index % 3 != 1}


def test_pictures_are_eight_times_as_large_in_range_and_without_side_effects(tmp_path):
    previewer = Previewer(TINY)
    save_previewer(previewer, tmp_path / "previewer.safetensors")
    loaded = load_previewer(tmp_path / "previewer.safetensors")
    torch.nn.ModuleList([loaded]).train()

    rgb = loaded(10 * torch.randn(2, 16, 3, 5))

    assert rgb.shape == (2, 3, 24, 40) and rgb.dtype == torch.float32
    assert rgb.min() >= 0 and rgb.max() <= 1
    assert config_from_state_dict(loaded.state_dict()) == TINY
    assert all(torch.equal(value, previewer.state_dict()[key]) for key, value in loaded.state_dict().items())
