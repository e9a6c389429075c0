"""`training create-model`: the wiki's "Create Model"."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.training.dreambooth.test_single_file import same, toy_parts
from training.cli import main
from training.dreambooth.sd_models.merged import merged_from
from training.dreambooth.sd_models.models import load_sd
from training.dreambooth.single_file.layout import UNET_PREFIX, average_key
from training.dreambooth.single_file.writing import write_single_file


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A merged SD 1 file with its running average."""
    path = tmp_path_factory.mktemp("source") / "OrangeMix2.safetensors"
    write_single_file(path, toy_parts("sd1"), family="sd1")
    tensors = load_file(path)
    own = {key.removeprefix(UNET_PREFIX): tensor for key, tensor in tensors.items() if key.startswith(UNET_PREFIX)}
    save_file(tensors | {average_key(key): tensor + 1 for key, tensor in own.items()}, path)
    return path


def test_a_file_becomes_a_folder_with_its_average_beside(source, tmp_path, capsys):
    code = main(["create-model", str(source), "--output", str(tmp_path / "made"), "--half"])

    told = capsys.readouterr().out
    plain, averaged = (load_sd(str(tmp_path / "made"), extract_ema=ema) for ema in (False, True))
    assert code == 0
    for part in ("family: sd1", "predicts: epsilon", "in unet_ema/", "nothing to unfreeze", "'OrangeMix2' looks like"):
        assert part in told
    assert same(plain.unet.state_dict(), {key: one.half().float() for key, one in toy_parts("sd1").unet.items()})
    assert not torch.equal(averaged.unet.conv_in.weight, plain.unet.conv_in.weight)
    assert merged_from(plain) is not None


def test_the_average_may_take_the_place_of_the_plain_weights(source, tmp_path):
    assert main(["create-model", str(source), "--output", str(tmp_path / "made"), "--ema", "ema"]) == 0

    made = load_sd(str(tmp_path / "made")).unet.state_dict()
    assert same(made, {key: tensor + 1 for key, tensor in toy_parts("sd1").unet.items()})
    assert not (tmp_path / "made" / "unet_ema").exists()


def test_what_cannot_be_made_is_said_and_nothing_is_written(source, tmp_path, capsys):
    write_single_file(tmp_path / "sd2.ckpt", toy_parts("sd2"), family="sd2")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("x")
    made = str(tmp_path / "made")

    assert main(["create-model", str(source), "--output", made, "--dry-run"]) == 0
    assert main(["create-model", str(tmp_path / "sd2.ckpt"), "--output", made]) == 3
    assert (
        main(["create-model", str(tmp_path / "sd2.ckpt"), "--output", made, "--prediction", "epsilon", "--ema", "both"])
        == 3
    )
    assert main(["create-model", str(source), "--output", str(tmp_path / "full")]) == 2

    said = capsys.readouterr().err
    assert "does not say what it predicts" in said and "no running average" in said and "is not empty" in said
    assert not (tmp_path / "made").exists() and len(list((tmp_path / "full").iterdir())) == 1
