"""Weights of no run: told apart, exported anew, drawn."""

import pytest
import torch
from PIL import Image, ImageChops

from tests.training.dreambooth.toy_sd import toy_text, toy_unet, toy_vae
from tests.training.toy import toy_config
from training.cli import main
from training.config.saving import SaveConfig
from training.dreambooth.sd_models.models import load_sd
from training.dreambooth.single_file.layout import Parts
from training.dreambooth.single_file.writing import write_single_file
from training.dreambooth.use_given import export_given_sd, recipe_of


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    path = tmp_path_factory.mktemp("given") / "anime.safetensors"
    parts = Parts(toy_unet("sd1").state_dict(), toy_vae().state_dict(), (toy_text().state_dict(),))
    write_single_file(path, parts, family="sd1", dtype=torch.float16, metadata={"ss_seed": "7"})
    return path


def test_weights_tell_which_recipe_they_are_for(given, tmp_path):
    (tmp_path / "prior").mkdir()
    assert recipe_of(str(given), None) == "dreambooth"
    assert recipe_of(str(tmp_path), None) == "stage_c"
    assert recipe_of("stabilityai/stable-cascade-prior", None) == "stage_c"
    assert recipe_of(str(given), toy_config()) == "stage_c"


def test_a_single_file_becomes_a_folder_and_back_bit_for_bit(given, tmp_path):
    save = SaveConfig(export_formats=("diffusers",))
    folder = export_given_sd(str(given), tmp_path / "one", config=None, save=save, dtype_name=None)[0].path
    save = SaveConfig(export_formats=("original",))
    file = export_given_sd(str(folder), tmp_path / "two", config=None, save=save, dtype_name=None)[0].path

    ours, theirs = (load_sd(str(path), dtype=torch.float16).unet.state_dict() for path in (file, given))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_format_of_stage_c_is_refused(given, tmp_path, capsys):
    code = main(["export", "--from", str(given), "--format", "combined", "--output", str(tmp_path / "x")])

    assert code != 0
    assert "combined is for stage C" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_pictures_are_drawn_from_a_file_and_from_a_folder_alike(given, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a bird --w 64 --h 48 --s 3 --d 5\n")
    export_given_sd(
        str(given), tmp_path / "out", config=None, save=SaveConfig(export_formats=("diffusers",)), dtype_name=None
    )

    drawn = []
    for name, source in (("a", given), ("b", tmp_path / "out" / "diffusers")):
        assert (
            main(["preview", "--from", str(source), "--prompts", str(prompts), "--output", str(tmp_path / name)]) == 0
        )
        drawn.append(Image.open(tmp_path / name / "step-00000000-00.png").convert("RGB"))
    assert drawn[0].size == (64, 48)
    assert ImageChops.difference(*drawn).getbbox() is None


def test_a_prompt_for_the_other_recipe_is_refused(given, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a bird --w 60 --h 48\n")

    code = main(["preview", "--from", str(given), "--prompts", str(prompts), "--output", str(tmp_path / "x")])

    assert code != 0
    assert "60 is not a multiple of 8" in capsys.readouterr().err
