"""configs/datasets/folder.toml: a folder of one's own, without models, and with the real ones uncommented."""

import tomllib
from pathlib import Path

from captioning import cli
from captioning.config import CaptioningConfig
from sharding.config import load_config, parse_config

PRESETS = Path(__file__).parents[2] / "configs" / "datasets"
FOLDER = PRESETS / "folder.toml"


def test_a_folder_of_ones_own_gets_captions_without_models(lab, capsys):
    tagged, untagged = (
        lab.record("a", source="mine", tags_general=["1girl", "long_hair"]),
        lab.record("b", source="mine"),
    )
    lab.keep([tagged, untagged])
    place = [str(FOLDER), "--workspace", str(lab.workspace.root), "--set", f"sources.mine.root={lab.pictures}"]

    codes = [cli.main([command, *place]) for command in ("annotate", "compose")]

    output = capsys.readouterr().out
    assert codes == [0, 0]
    assert "the dataset names no models, nothing to do" in output and "empty captions: 1" in output
    assert lab.texts() == ["1girl, long hair", ""]
    assert not (lab.workspace.root / "annotations").exists()


def test_the_real_models_can_be_uncommented_and_are_those_of_sotediffusion():
    text = FOLDER.read_text(encoding="utf-8")
    active, commented = text.split("# [annotate]\n")
    uncommented = active + "[annotate]\n" + "".join(line.removeprefix("# ") + "\n" for line in commented.splitlines())

    config = parse_config(tomllib.loads(uncommented), CaptioningConfig, name="folder.toml")

    original = load_config(PRESETS / "sotediffusion.toml", CaptioningConfig).annotate
    assert config.annotate.device == original.device
    for name, model in config.annotate.models.items():
        chosen = model.model_dump(exclude_unset=True)
        assert chosen.items() <= original.models[name].model_dump().items()
    assert set(config.annotate.models) == {"wd", "aesthetic", "quality"}
    assert load_config(FOLDER, CaptioningConfig).annotate.models == {}
