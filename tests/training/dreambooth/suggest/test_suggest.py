"""`training suggest`: the wiki's choices by card and picture count, in a file that loads, packs and plans."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sharding.config import ConfigError, load_config
from tests.training.dreambooth.toy_sd import toy_text, toy_unet, toy_vae
from training.cli import main
from training.config import RunConfig
from training.dreambooth.suggest.counts import count_concepts
from training.dreambooth.suggest.length import length_for, steps_between
from training.dreambooth.suggest.method import choose_way
from training.dreambooth.suggest.suggestion import suggest


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Toy models of the true classes, as folders."""
    root = tmp_path_factory.mktemp("models")
    for family in ("sd1", "sdxl"):
        texts = [toy_text(), toy_text(projection=True, act="gelu")][: 1 + (family == "sdxl")]
        names = ["unet", "vae", "text_encoder", "text_encoder_2"]
        for name, part in zip(names, [toy_unet(family), toy_vae(), *texts], strict=False):
            part.save_pretrained(root / family / name)
    return {family: str(root / family) for family in ("sd1", "sdxl")}


def write_concepts(root: Path, numbers: dict[str, int], *, head: str = "", more: str = "") -> Path:
    random = np.random.default_rng(0)
    text = f"{head}\n"
    for name, number in numbers.items():
        (root / name).mkdir(parents=True)
        for place in range(number):
            Image.fromarray(random.integers(0, 255, (64, 48, 3), np.uint8)).save(root / name / f"{place}.png")
            (root / name / f"{place}.txt").write_text(f"{name}, smile")
        text += f'[[concepts]]\nname = "{name}"\nfolder = "{root / name}"\n{more}\n'
    (root / "concepts.toml").write_text(text)
    return root / "concepts.toml"


@pytest.mark.parametrize(
    ("number", "epochs", "stages"), [(8, 120, (52, 98)), (15, 80, (35, 65)), (30, 80, (35, 65)), (48, 50, (22, 40))]
)
def test_epochs_follow_the_number_of_pictures(number, epochs, stages):
    assert length_for(number, is_staged=False).stages == (epochs,)
    assert length_for(number, is_staged=True).stages == stages


def test_intervals_are_ten_epochs():
    assert steps_between(21, 4) == 60


def test_concepts_are_counted_as_they_will_be_packed(tmp_path):
    more = 'class_images = { prompt = "1girl", images_per_image = 2 }'
    path = write_concepts(tmp_path, {"a": 6, "b": 2}, more=more)
    (tmp_path / "b" / "twice.png").write_bytes((tmp_path / "b" / "0.png").read_bytes())
    (tmp_path / "b" / "broken.png").write_bytes(b"nothing")

    counts = count_concepts(path)
    path.write_text("balance = true\n" + path.read_text())
    balanced = count_concepts(path)

    assert counts.by_concept == {"a": 6, "b": 2}
    assert (counts.class_images, counts.showings) == (16, 16)
    assert "1 pictures are broken" in counts.notes[0]
    assert "'a'" in counts.advice and "repeats b 3" in counts.advice
    assert balanced.shown == {"a": 6, "b": 6} and balanced.advice == ""


def test_a_concept_without_pictures_is_refused(tmp_path):
    path = write_concepts(tmp_path, {"a": 2}, head="held_out = 2")

    with pytest.raises(ConfigError, match="2 of them held out"):
        count_concepts(path)


@pytest.mark.parametrize(
    ("family", "vram", "method"),
    [
        ("sd1", 8, "lora"), ("sd1", 10, "staged"), ("sd1", 12, "full"), ("sdxl", 10, "lora"), ("sdxl", 24, "full"),
    ],
)  # fmt: skip
def test_the_way_is_the_wikis_for_the_card(models, family, vram, method):
    way = choose_way(family, models[family], side=64, vram_gb=vram)

    assert (way.method, way.micro_batch_size, way.checkpointing, way.passed_over) == (method, 4, False, ())


def test_a_card_that_is_too_small_is_told_by_how_much(models):
    with pytest.raises(ValueError, match=r"--vram 0.6: nothing fits: lora takes \d.\d GB with one image, 0.0 GB"):
        choose_way("sd1", models["sd1"], side=64, vram_gb=0.6)


@pytest.mark.parametrize(("family", "vram"), [("sd1", 8), ("sd1", 10), ("sd1", 12), ("sdxl", 12), ("sdxl", 24)])
def test_every_suggestion_loads_and_says_why(tmp_path, models, family, vram):
    path = write_concepts(tmp_path, {"a": 3}, more='sample = { prompt = "[filewords]", negative = "bad", seed = 5 }')

    found = suggest(path, vram_gb=vram, model=models[family])

    (tmp_path / "run.toml").write_text(found.text)
    config = load_config(tmp_path / "run.toml", RunConfig, [])
    recipe = config.of_dreambooth
    assert (config.seed, recipe.sanity_seed, recipe.sanity_negative) == (5, 5, "bad")
    assert config.optimizer.name == "adamw8bit" and config.save.export_dtype == "fp16"
    assert found.text.count("wiki:") > 10
    if vram == 8:
        assert config.lora is not None
        assert (config.optimizer.learning_rate, config.optimizer.text_encoder_learning_rate) == (1e-4, 5e-5)
    if family == "sd1" and vram == 10:
        assert [stage.learning_rate for stage in recipe.stages] == [2e-6, 1e-6]
        assert [stage.train for stage in recipe.stages] == [("unet", "text_encoder"), ("unet",)]
    if vram in (12, 24) and config.lora is None:
        assert (config.optimizer.learning_rate, config.data.epochs, recipe.train) == (1e-6, 120, ("unet",))


def test_several_concepts_get_the_wikis_prior_and_held_out_pictures_a_validation(tmp_path, models):
    more = 'class_images = { prompt = "1girl", images_per_image = 1 }'
    path = write_concepts(tmp_path, {"a": 4, "b": 2}, head="held_out = 1", more=more)

    found = suggest(path, vram_gb=8, model=models["sd1"])

    assert "prior_weight = 0.3" in found.text and 'chunk = "concepts/held-out"' in found.text
    assert any("crush" in note for note in found.notes)


def test_what_the_command_writes_is_packed_and_planned(tmp_path, models, capsys):
    path = write_concepts(tmp_path, {"a": 3, "b": 3})
    output = tmp_path / "run.toml"

    assert main(["suggest", str(path), "--vram", "10", "--model", models["sd1"], "--output", str(output)]) == 0
    config = load_config(output, RunConfig, [f"data.workspace={tmp_path / 'ws'}"])
    elsewhere = ["--set", f"data.workspace={tmp_path / 'ws'}", "--set", "device=cpu", "--set", "optimizer.name=adamw"]
    assert main(["pack-concepts", str(output), *elsewhere]) == 0
    assert main(["plan", str(output), *elsewhere]) == 0

    assert str(output) in output.read_text() and "THIS_FILE" not in output.read_text()
    assert len(config.of_dreambooth.stages) == 2
    assert "2 chunks, 52 to 98 epochs each" in capsys.readouterr().out
    assert main(["suggest", str(path), "--vram", "10", "--output", str(output)]) == 2
    assert main(["suggest", str(path), "--vram", "0"]) == 2


@pytest.mark.slow
def test_sdxl_on_12_gb_is_refused_with_what_is_missing():
    with pytest.raises(ValueError, match=r"nothing fits: lora takes 11\.\d GB with one image, 11\.\d GB are there"):
        choose_way("sdxl", "owner/sdxl", side=1024, vram_gb=12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "side", "vram", "expected"),
    [
        ("sd1", 512, 8, ("lora", 2, False)),
        ("sd1", 512, 10, ("staged", 4, True)),
        ("sd1", 512, 12, ("full", 2, True)),
        ("sd1", 512, 24, ("full", 4, False)),
        ("sdxl", 1024, 16, ("lora", 2, True)),
        ("sdxl", 1024, 24, ("full", 2, True)),
    ],
)  # fmt: skip
def test_full_size_models_on_cards(family, side, vram, expected):
    name = {"sd1": "owner/sd15", "sdxl": "owner/sdxl"}[family]

    way = choose_way(family, name, side=side, vram_gb=vram)

    assert (way.method, way.micro_batch_size, way.checkpointing) == expected
