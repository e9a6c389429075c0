"""The recipe `stage_c` with adapters and tokens: what it exports and draws."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.training.lora.models import shake
from tests.training.toy import toy_config
from training.recipes.stage_c import StageC


def loaded(paths, **changes):
    stage_c = {name: str(paths[name]) for name in ("text_encoder", "tokenizer", "effnet", "previewer")}
    config = toy_config(**{**changes, "stage_c": {**stage_c, "network": str(paths["stage_c"])}})
    recipe = StageC(config)
    recipe.load(torch.device("cpu"))
    return recipe


def names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")}


def test_whole_weights_for_diffusers_have_no_tokens_that_they_lack(paths, tmp_path):
    recipe = loaded(
        paths,
        lora={"base_weights": "fp32", "formats": ["kohya", "merged"]},
        tokens={"train": [{"token": "[it]", "initialise": "^dog</w>$"}]},
        save={"export_formats": ["diffusers"]},
    )
    shake(recipe.trainable())

    recipe.export(tmp_path, dtype=torch.float32, metadata={"chunkline.chunk": "a/0000"})

    assert {
        "lora.safetensors",
        "tokens/it.safetensors",
        "diffusers/prior/diffusion_pytorch_model.safetensors",
    } <= names(tmp_path)
    tokenizer = json.loads((tmp_path / "diffusers" / "tokenizer" / "tokenizer.json").read_text())
    assert max(token["id"] for token in tokenizer["added_tokens"]) < 49408
    assert "[it]" in (tmp_path / "tokenizer" / "tokenizer.json").read_text()


@pytest.mark.parametrize(
    ("changes", "files"),
    [
        ({"lora": {"base_weights": "fp32"}}, {"lora.safetensors"}),
        ({"tokens": {"only": True, "train": [{"existing": "^girl</w>$"}]}}, {"tokens/girl.safetensors"}),
        (
            {"tokens": {"train": [{"existing": "^girl</w>$"}]}},
            {"tokens/girl.safetensors", "stage_c.safetensors", "text_model.safetensors"},
        ),
        ({"tokens": {"train": [{"token": "[it]"}]}}, {"tokens/it.safetensors", "stage_c.safetensors"}),
    ],
)
def test_an_export_holds_what_was_trained(paths, tmp_path, changes, files):
    recipe = loaded(paths, **changes)
    shake(recipe.trainable())

    recipe.export(tmp_path, dtype=torch.float32, metadata={})

    assert names(tmp_path) == files


def test_weights_that_are_given_are_exported_in_place_of_the_live_ones(paths, tmp_path):
    recipe = loaded(paths, lora={"base_weights": "fp32", "formats": ["kohya", "merged"]})
    start = {name: value.clone() for name, value in recipe.trainable().state_dict().items()}
    shake(recipe.trainable())

    recipe.export(tmp_path, dtype=torch.float32, metadata={}, weights=start)

    whole, base = load_file(tmp_path / "stage_c.safetensors"), load_file(paths["stage_c"])
    assert all(torch.equal(whole[name], value.float()) for name, value in base.items())
    assert not any(value.any() for name, value in load_file(tmp_path / "lora.safetensors").items() if "lora_up" in name)
