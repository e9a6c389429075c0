"""The encoder against torchvision, its key names and its refusal to leave evaluation mode."""

import importlib.util
from pathlib import Path

import pytest
import torch

from training.stage_c.effnet import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    EffNetConfig,
    EffNetEncoder,
    config_from_state_dict,
    load_effnet,
    save_effnet,
)

spec = importlib.util.spec_from_file_location("make_effnet_golden", Path(__file__).with_name("make_effnet_golden.py"))
assert spec is not None and spec.loader is not None
make_effnet_golden = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_effnet_golden)

TINY = EffNetConfig(stem_width=8, widths=(8, 8, 12, 16, 20, 24), depths=(1, 2, 1, 2, 1, 2), head_width=32)
# From make_effnet_golden.py with torch 2.14.1 and torchvision 0.29.1 (commands in that file).
# fmt: off
GOLDEN = [
    -50.708873, -71.971711, -87.770031, -96.497444, -42.859796, -28.012722, -93.18851, -169.228383,
    -149.221277, -93.721091, -119.915291, -151.242807, -99.025426, -49.113722, -31.650543, -14.29398,
    0.364444, -6.395866, -178.578886, -134.358598, -64.002516, -104.351512, -86.532676, -85.850037,
    59.044383, 43.478225, 61.967911, -28.339762, -22.557101, -12.224347, 13.816173, 75.752602,
    139.703255, -25.880449, 12.134689, -29.663143, 100.959373, 118.25689, 93.124574, -15.444285,
    70.051987, 65.043421, -106.625284, -50.616833, -73.422421, -59.773514, -66.640075, -129.510349,
    17.646538, 45.41942, -28.904147, -24.055264, -6.024262, -4.773167, -72.183883, -26.07008,
    -49.693501, -24.34397, -52.643521, -64.818198, -5.550531, -94.436926, -110.194563, 166.13636,
    100.610048, 124.396381, -16.576082, -36.51533, -16.527662, -156.152542, -170.668505, -173.372688,
    32.766705, 42.243885, 31.534867, -5.991481, 201.317761, 50.178574, -63.360305, -97.169408,
    -108.339242, -3.79488, 83.525359, 14.21285, -149.174898, -56.66347, 53.885629, -1.101444,
    108.17793, 132.943325, -16.684854, -2.262414, 44.531004, -18.98812, -73.870098, -11.733883,
]
# fmt: on


def test_the_encoder_has_the_published_size_and_keys():
    encoder = EffNetEncoder(EffNetConfig())
    keys = encoder.state_dict()

    assert sum(parameter.numel() for parameter in encoder.backbone.parameters()) == 20_177_488
    assert sum(parameter.numel() for parameter in encoder.mapper.parameters()) == 20_480
    assert keys["backbone.1.1.block.0.0.weight"].shape == (24, 24, 3, 3)
    assert keys["backbone.2.3.block.1.0.weight"].shape == (48, 192, 1, 1)
    assert keys["backbone.4.0.block.2.fc1.weight"].shape == (16, 256, 1, 1)
    assert keys["backbone.6.14.block.3.1.running_var"].shape == (256,)
    assert keys["backbone.7.0.weight"].shape == (1280, 256, 1, 1)
    assert "mapper.1.running_mean" in keys and "mapper.1.weight" not in keys
    assert config_from_state_dict(keys) == EffNetConfig()


def test_latents_equal_those_of_torchvision():
    encoder = EffNetEncoder(EffNetConfig())
    encoder.load_state_dict(make_effnet_golden.seeded_state_dict(encoder))

    picture = make_effnet_golden.seeded_picture()
    golden = torch.tensor(GOLDEN, dtype=torch.float64).reshape(1, 16, 2, 3)

    latents = encoder.encode(picture)
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        exact = encoder.double()((picture - mean) / std)

    torch.testing.assert_close(exact, golden, rtol=1e-6, atol=1e-4)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents.double(), golden, rtol=0, atol=2e-3 * golden.std().item())


def test_training_mode_of_a_parent_does_not_reach_the_encoder():
    encoder = EffNetEncoder(TINY)
    parent = torch.nn.ModuleList([encoder]).train()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}

    with torch.autocast("cpu", dtype=torch.bfloat16):
        latents = encoder.encode(torch.rand(2, 3, 64, 96))

    assert parent.training and not any(module.training for module in encoder.modules())
    assert latents.shape == (2, 16, 2, 3) and latents.dtype == torch.float32 and not latents.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


def test_a_narrow_encoder_is_read_back_exactly_also_out_of_a_combined_file(tmp_path):
    from training.weight_files import write_tensors

    encoder = EffNetEncoder(TINY)
    save_effnet(encoder, tmp_path / "effnet_encoder.safetensors")
    combined = {f"vae.encoder.{key}": value for key, value in encoder.state_dict().items()}
    write_tensors(tmp_path / "combined.safetensors", {**combined, "model.diffusion_model.x": torch.zeros(1)})
    torch.save({"state_dict": encoder.state_dict()}, tmp_path / "effnet.pt")

    for name in ("effnet_encoder.safetensors", "combined.safetensors", "effnet.pt"):
        loaded = load_effnet(tmp_path / name)

        assert loaded.config == TINY
        assert all(torch.equal(value, encoder.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_what_cannot_be_encoded_is_refused(tmp_path):
    encoder = EffNetEncoder(TINY)

    with pytest.raises(ValueError, match="multiples of 32, got \\(1, 3, 64, 70\\)"):
        encoder.encode(torch.rand(1, 3, 64, 70))
    with pytest.raises(ValueError, match="floating point"):
        encoder.encode(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match="keep the encoder in float32"):
        encoder.half().encode(torch.rand(1, 3, 64, 64))
    with pytest.raises(FileNotFoundError, match="no such weights file"):
        load_effnet(tmp_path / "absent.safetensors")
