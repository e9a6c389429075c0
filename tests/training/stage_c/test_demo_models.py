"""The tiny models of the demo load through the same functions as the real ones and work together."""

import hashlib

import pytest
import torch

from scripts.demo_models.stage_c import make_stage_c_models
from training.stage_c.effnet import load_effnet
from training.stage_c.formats import load_stage_c
from training.stage_c.gdf import diffuse
from training.stage_c.previewer import load_previewer
from training.stage_c.text import TextConditioner, load_tokenizer, tokenize
from training.stage_c.text_files import load_text_model


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return make_stage_c_models(tmp_path_factory.mktemp("models"), seed=0)


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_models_are_small_silent_and_the_same_for_the_same_seed(paths, tmp_path, capfd):
    make_stage_c_models(tmp_path / "again", seed=0)
    make_stage_c_models(tmp_path / "other", seed=1)
    printed = capfd.readouterr()

    folder = paths["stage_c"].parent
    assert digests(tmp_path / "again") == digests(folder)
    assert digests(tmp_path / "other")["stage_c.safetensors"] != digests(folder)["stage_c.safetensors"]
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 25_000_000
    assert (printed.out, printed.err) == ("", "")


def test_a_training_forward_and_a_preview_run_through_all_of_them(paths):
    encoder, previewer = load_effnet(paths["effnet"]), load_previewer(paths["previewer"])
    conditioner = TextConditioner(load_text_model(paths["text_encoder"]))
    tokenizer, network = load_tokenizer(paths["tokenizer"]), load_stage_c(paths["stage_c"])
    generator = torch.Generator().manual_seed(0)

    latents = encoder.encode(torch.rand(2, 3, 128, 192, generator=generator))
    windows, _ = tokenize(tokenizer, ["a photo of a cat", "1girl, solo"], max_tokens=150)
    clip_text, clip_text_pooled = conditioner(windows)
    noise = torch.randn(latents.shape, generator=generator)
    diffused = diffuse(latents, torch.tensor([0.2, 0.7]), noise)
    prediction = network(diffused.noised, diffused.r, clip_text, clip_text_pooled)
    loss = (prediction.float() - diffused.target).square().mean(dim=(1, 2, 3))
    loss.mean().backward()

    assert windows[0, 0, :4].tolist() == [49406, 320, 1125, 539]
    assert latents.shape == (2, 16, 4, 6) and clip_text.shape == (2, 152, network.config.c_clip_text)
    assert torch.isfinite(loss).all() and 0.2 < loss.mean() < 5
    for module in (network, conditioner):
        assert all(parameter.grad is not None for parameter in module.parameters())
    picture = previewer(latents)
    assert picture.shape == (2, 3, 32, 48) and picture.std() > 0.03
