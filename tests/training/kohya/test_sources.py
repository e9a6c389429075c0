"""Commands with files, files without a command, and the SD scripts': what is read, what is listed as unknown."""

import json
import tomllib

import pytest

from sharding.config import ConfigError, parse_config
from training.config import RunConfig
from training.kohya.explanation import explain
from training.kohya.given import Given
from training.kohya.printed import explanation_text
from training.kohya.run_toml import run_toml
from training.kohya.sources import given_by_command, given_by_file

STAGE_C = (
    "python stable_cascade_train_stage_c.py --stage_c_checkpoint_path c.safetensors --effnet_checkpoint_path "
    "e.safetensors --resolution 1024 --max_train_epochs 1 "
)


def explained(given: Given, *overrides: str):
    return explain(given, workspace="w", chunks="kohya/*", overrides=overrides)


def test_a_config_file_fills_what_the_command_does_not_say(tmp_path):
    (tmp_path / "c.toml").write_text(
        '[any]\nlearning_rate = "3e-5"\ntrain_batch_size = 4\nmystery = 1\n[b]\nseed = 5\n'
        'optimizer_args = ["eps=1e-6"]\n'
    )

    given = given_by_command(f"{STAGE_C} --learning_rate 1e-6 --config_file {tmp_path}/c")

    assert given.value("learning_rate") == 1e-6
    assert given.value("train_batch_size") == 4
    assert given.value("seed") == 5
    assert given.sources["train_batch_size"] == "c.toml"
    assert [(one.name, one.value) for one in given.unknown] == [("mystery", "1")]
    assert "kohya takes it without a word" in given.unknown[0].hint
    values = explained(given).values()
    assert values["optimizer"]["eps"] == 1e-6 and values["seed"] == 5


@pytest.mark.parametrize("kind", ["toml", "json"])
def test_a_dataset_config_goes_before_flags_where_its_subsets_agree(tmp_path, kind):
    path = tmp_path / f"d.{kind}"
    if kind == "toml":
        path.write_text(
            "[general]\nshuffle_caption = true\nkeep_tokens = 1\n"
            "[[datasets]]\nresolution = [768, 1024]\nbatch_size = 3\n"
            "enable_bucket = true\nbucket_no_upscale = true\n"
            '[[datasets.subsets]]\nimage_dir = "a"\nnum_repeats = 2\nflip_aug = true\n'
            '[[datasets.subsets]]\nimage_dir = "b"\nnum_repeats = 5\nflip_aug = true\nkeep_tokens = 2\n'
        )
    else:
        subset = {"flip_aug": True, "num_repeats": 2}
        dataset = {"resolution": [768, 1024], "batch_size": 3, "enable_bucket": True, "bucket_no_upscale": True}
        subsets = [{"image_dir": "a", **subset}, {"image_dir": "b", **subset, "keep_tokens": 2}]
        path.write_text(
            json.dumps(
                {"general": {"shuffle_caption": True, "keep_tokens": 1}, "datasets": [{**dataset, "subsets": subsets}]}
            )
        )

    given = given_by_command(f"{STAGE_C} --train_data_dir p --dataset_config {path}")
    found = explained(given)
    values = found.values()

    assert values["buckets"]["resolution"] == [768, 1024]
    assert values["buckets"]["family"] == "no_upscale"
    assert values["batch"]["micro_batch_size"] == 3
    assert values["caption"]["shuffle"] is True and values["data"]["horizontal_flip"] is True
    assert "keep_first_tags" not in values["caption"]
    assert any("subsets differ in keep_tokens (1, 2)" in note for note in found.notes)
    assert any("num_repeats become [[plan.weights]]" in note for note in found.notes)
    assert f"--dataset-config {path}" in found.commands[0]


def test_the_guis_json_is_read_with_its_own_names(tmp_path):
    path = tmp_path / "gui.json"
    path.write_text(
        json.dumps(
            {
                "LoRA_type": "Standard", "sdxl": True, "pretrained_model_name_or_path": "sdxl-base", "network_dim": 64,
                "network_alpha": 32, "max_resolution": "1024,1024", "epoch": 4, "optimizer": "AdamW8bit",
                "optimizer_args": '"weight_decay=0.1"', "lr_warmup": 10, "max_train_steps": 1600, "xformers": "sdpa",
                "train_batch_size": 2, "learning_rate": 0.001, "min_snr_gamma": 0, "num_processes": 2, "seed": 0,
                "shuffle_caption": False, "sdxl_no_half_vae": True, "mixed_precision": "bf16", "up_lr_weight": "1,2",
                "additional_parameters": "--flip_aug --strange 3", "model_list": "custom", "enable_bucket": True,
                "bucket_no_upscale": True, "caption_extension": "",
            }
        )
    )  # fmt: skip

    given = given_by_file(path)
    found = explained(given)

    assert given.script == "sdxl_network"
    assert given.flags["max_train_epochs"] == 4 and given.flags["resolution"] == "1024,1024"
    assert given.flags["lr_warmup_steps"] == 160
    assert given.flags["no_half_vae"] is True and given.flags["sdpa"] is True and given.flags["flip_aug"] is True
    assert not {"min_snr_gamma", "seed", "caption_extension", "model_list", "shuffle_caption"} & given.flags.keys()
    assert given.launcher == {"num_processes": 2}
    assert sorted(one.name for one in found.unknown) == ["--strange", "up_lr_weight"]
    assert found.values()["batch"] == {"micro_batch_size": 2, "batch_size": 4}
    assert found.values()["optimizer"]["name"] == "adamw8bit"
    assert found.values()["optimizer"]["weight_decay"] == 0.1
    rows = {row.flag.split()[0]: row for row in found.rows}
    assert rows["--network_dim"].value == "64"
    assert "dreambooth.model = " in rows["--pretrained_model_name_or_path"].here[0]


@pytest.mark.parametrize(
    ("values", "script"),
    [
        ({"model_list": "", "train_data_dir": "x"}, "db"),
        ({"model_list": "", "image_folder": "x"}, "fine_tune"),
        ({"model_list": "", "sdxl": True}, "sdxl"),
        ({"LoRA_type": "LyCORIS/LoHa"}, "network"),
    ],
)
def test_the_guis_tab_is_told_from_its_keys(tmp_path, values, script):
    (tmp_path / "g.json").write_text(json.dumps(values))

    assert given_by_file(tmp_path / "g.json").script == script


def test_a_config_file_alone_is_enough(tmp_path):
    (tmp_path / "c.toml").write_text(
        'stage_c_checkpoint_path = "c.safetensors"\neffnet_checkpoint_path = "e.safetensors"\nresolution = "512,512"\n'
    )

    found = explained(given_by_file(tmp_path / "c.toml"))

    assert found.script == "stable_cascade_train_stage_c"
    assert 'network = "c.safetensors"  # --stage_c_checkpoint_path' in run_toml(found)
    assert given_by_file(tmp_path / "c.toml", script="train_db.py").script == "db"
    with pytest.raises(ConfigError, match="--script x: not known"):
        given_by_file(tmp_path / "c.toml", script="x")


def test_unknown_flags_are_listed_with_what_may_be_meant():
    given = given_by_command(
        f"torchrun --nproc_per_node 2 -m {STAGE_C} --gradient_checkpoint --learning_rat 2 --sdpa yes --xyz=1 stray"
    )

    found = {one.name: one for one in given.unknown}
    assert given.has("gradient_checkpointing")  # argparse takes any beginning that is one flag's
    assert set(found) == {"--nproc_per_node", "-m", "--learning_rat", "yes", "--xyz", "stray"}
    assert found["--learning_rat"].hint == "is --learning_rate meant?"
    assert found["yes"].hint == "stands behind the switch --sdpa, which takes no value"
    text = explanation_text(explained(given))
    assert "Not known here:" in text and "--xyz 1" in text


@pytest.mark.parametrize("script", ["train_db", "fine_tune", "train_network", "sdxl_train", "sdxl_train_network"])
def test_commands_of_the_sd_scripts_give_a_table_and_a_run_of_the_recipe_dreambooth(script):
    given = given_by_command(
        f"python {script}.py --pretrained_model_name_or_path m --resolution 512 --clip_skip 2 --train_batch_size 3 "
        "--optimizer_type Lion --learning_rate 1e-5 --min_snr_gamma 5 --enable_bucket --train_data_dir pictures"
    )
    found = explained(given)

    rows = {row.flag: row for row in found.rows}
    about = "about dreambooth.clip_skip" if script.startswith("sdxl") else "dreambooth.clip_skip = 2"
    assert about in rows["--clip_skip"].here
    assert 'optimizer.name = "lion"' in rows["--optimizer_type"].here
    assert "batch.micro_batch_size = 3" in rows["--train_batch_size"].here
    assert "dreambooth.loss_gamma = 5.0" in rows["--min_snr_gamma"].here
    assert not any(one.key.startswith("stage_c.") for one in found.settings)
    config = parse_config(tomllib.loads(run_toml(found)), RunConfig, name="run.toml")
    assert config.recipe_name == "dreambooth" and config.of_dreambooth.loss_weighting == "min_snr"
    assert "python -m training import-concepts pictures --output concepts.toml" in found.commands


def test_a_value_that_is_missing_is_refused():
    with pytest.raises(ConfigError, match="--train_batch_size: its value is missing"):
        given_by_command(f"{STAGE_C} --train_batch_size")


@pytest.mark.parametrize("words", ["--config_file nothing.toml", "--dataset_config nothing.json"])
def test_without_a_file_of_settings_there_is_a_table_but_no_run_toml(words):
    found = explained(given_by_command(f"{STAGE_C} {words}"))

    assert found.problems[0].text.endswith("is not here, and what it says is not above")
    assert "stage_c.network" in explanation_text(found)
    with pytest.raises(ConfigError, match="is not here"):
        run_toml(found)


def test_files_that_are_no_settings_say_so(tmp_path):
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "empty.toml").write_text("[general]\n")

    with pytest.raises(ConfigError, match="must be an object of settings"):
        given_by_file(tmp_path / "list.json")
    with pytest.raises(ConfigError, match="not valid JSON"):
        given_by_file(tmp_path / "bad.json")
    with pytest.raises(ConfigError, match=r"has no \[\[datasets.subsets\]\]"):
        given_by_command(f"{STAGE_C} --dataset_config {tmp_path}/empty.toml")
