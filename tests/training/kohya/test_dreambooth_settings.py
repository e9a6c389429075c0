"""Flags of kohya's Stable Diffusion scripts: what they become in the recipe dreambooth."""

import tomllib

import pytest

from sharding.config import ConfigError, parse_config
from training.config import RunConfig
from training.kohya.explanation import explain
from training.kohya.run_toml import run_toml
from training.kohya.sources import given_by_command

MODEL = "--pretrained_model_name_or_path m.safetensors --resolution 512 --learning_rate 1e-6 --train_data_dir pictures"


def explained(script, words="", *overrides):
    given = given_by_command(f"python {script}.py {MODEL} {words}")
    return explain(given, workspace="w", chunks="kohya/*", overrides=overrides)


def config_of(script, words="", *overrides):
    text = run_toml(explained(script, words, *overrides))
    return parse_config(tomllib.loads(text), RunConfig, name="run.toml")


@pytest.mark.parametrize(
    ("script", "words", "train"),
    [
        ("train_db", "", ("unet", "text_encoder")),
        ("train_db", "--stop_text_encoder_training -1", ("unet",)),
        ("fine_tune", "", ("unet",)),
        ("fine_tune", "--train_text_encoder", ("unet", "text_encoder")),
        ("sdxl_train", "--train_text_encoder", ("unet", "text_encoder", "text_encoder_2")),
        ("sdxl_train", "--train_text_encoder --learning_rate_te2 0", ("unet", "text_encoder")),
        ("train_network", "", ("unet", "text_encoder")),
        ("train_network", "--network_train_unet_only", ("unet",)),
        ("train_network", "--network_train_text_encoder_only", ("text_encoder",)),
        ("sdxl_train_network", "", ("unet", "text_encoder", "text_encoder_2")),
    ],
)
def test_the_parts_are_those_that_kohya_trains(script, words, train):
    config = config_of(script, words)

    assert config.of_dreambooth.train == train
    assert (config.lora is not None) == ("network" in script)
    if config.lora is not None:
        assert (config.lora.text_encoder is not None) == (train != ("unet",))


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        ("--vae v.safetensors", "vae", "v.safetensors"),
        ("--mixed_precision fp16", "vae_dtype", "fp16"),
        ("--mixed_precision fp16 --no_half_vae", "vae_dtype", "fp32"),
        ("--v_parameterization --zero_terminal_snr", "zero_terminal_snr", True),
        ("--v_parameterization", "prediction", "v_prediction"),
        ("", "prediction", "epsilon"),
        ("--clip_skip 2", "clip_skip", 2),
        ("--max_token_length 225", "max_tokens", 225),
        ("--prior_loss_weight 0.3", "prior_weight", 0.3),
        ("", "prior_weight", 1.0),
        ("--loss_type huber --huber_c 0.2", "huber_c", 0.2),
        ("--loss_type smooth_l1", "loss", "smooth_l1"),
        ("--min_snr_gamma 5", "loss_weighting", "min_snr"),
        ("--debiased_estimation_loss", "loss_weighting", "debiased"),
        ("--noise_offset 0.05", "offset_noise", 0.05),
        ("--multires_noise_iterations 6", "multires_iterations", 6),
        ("--multires_noise_iterations 6 --multires_noise_discount 0.4", "multires_discount", 0.4),
        ("--ip_noise_gamma 0.1", "input_perturbation", 0.1),
        ("--min_timestep 200", "timestep_range", (0.2, 1.0)),
        ("--gradient_checkpointing", "gradient_checkpointing", True),
        ("--xformers", "attention", "sdpa"),
    ],
)
def test_flags_become_keys_of_the_recipe(words, key, value):
    assert getattr(config_of("train_db", words).of_dreambooth, key) == value


def test_a_text_encoder_stops_after_a_share_of_the_epochs():
    words = "--max_train_steps 1000 --stop_text_encoder_training 350"

    assert config_of("train_db", words, "data.epochs=100").of_dreambooth.text_encoder_ratio == 0.35
    with pytest.raises(ConfigError, match="whole epochs are counted here"):
        config_of("train_db", words)


def test_second_text_encoders_have_the_rates_of_their_flags():
    whole = config_of("sdxl_train", "--train_text_encoder --learning_rate_te1 2e-6 --learning_rate_te2 3e-6")
    lora = config_of("sdxl_train_network", "--unet_lr 1e-4 --text_encoder_lr 5e-5 4e-5 --network_dim 8")

    assert whole.optimizer.text_encoder_learning_rate == 2e-6
    assert whole.of_dreambooth.text_encoder_2_learning_rate == 3e-6
    assert lora.optimizer.text_encoder_learning_rate == 5e-5
    assert lora.of_dreambooth.text_encoder_2_learning_rate == 4e-5
    assert lora.lora.rank == 8


def test_folders_become_concepts_and_metadata_files_chunks():
    folders = explained("train_db", "--reg_data_dir reg --cache_latents")
    metadata = explained("fine_tune", "--in_json meta.json")

    assert folders.values()["data"]["chunks"] == ["concepts/*"]
    assert folders.values()["dreambooth"]["concepts"] == "concepts.toml"
    assert [command.split()[3] for command in folders.commands] == [
        "import-concepts", "doctor", "pack-concepts", "encode-latents", "run",
    ]  # fmt: skip
    assert 'class_images = { folder = "reg"' in folders.notes[0]
    assert metadata.values()["data"]["chunks"] == ["kohya/*"] and "concepts" not in metadata.values()["dreambooth"]
    assert "sharding import-kohya pictures" in metadata.commands[0]


@pytest.mark.parametrize(
    ("words", "expected", "override"),
    [
        ("--loss_type l1", "--loss_type: l1 is not here", 'dreambooth.loss="huber"'),
        ("--zero_terminal_snr", "needs --v_parameterization", "dreambooth.zero_terminal_snr=false"),
        ("--weighted_captions", "are not here", "dreambooth.max_tokens=75"),
        ("--v_pred_like_loss 1", "this weighting is not here", 'dreambooth.loss_weighting="none"'),
        ("--min_snr_gamma 5 --debiased_estimation_loss", "one of them", 'dreambooth.loss_weighting="min_snr"'),
        (
            "--max_train_epochs 10 --stop_text_encoder_training 100", "are a share of the epochs",
            "dreambooth.text_encoder_ratio=0.5",
        ),
    ],
)  # fmt: skip
def test_what_is_not_here_is_refused_until_it_is_settled(words, expected, override):
    with pytest.raises(ConfigError, match=expected):
        config_of("train_db", words)

    assert config_of("train_db", words, override).recipe_name == "dreambooth"
