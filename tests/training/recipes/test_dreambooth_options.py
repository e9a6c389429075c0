"""Every option of [dreambooth] changes something: a loss, a weight, what is trained, a schedule, a file."""

import json
import re
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from tests.training.dreambooth.toy_recipe import (
    LONG,
    load_recipe,
    losses_of,
    save_model,
    sd_batch,
    sd_config,
    train_step,
    weighted,
)
from tests.training.dreambooth.toy_sd import toy_unet
from training.config.dreambooth import DreamBoothConfig, StageConfig
from training.dreambooth.networks import load_model
from training.stage_c.text import load_tokenizer
from training.stages import stage_config, stages_of

ROOT = Path(__file__).parents[3]
HUBER, TAGS = {"loss": "huber"}, ", ".join(f"a girl with a very long blue hat {number}" for number in range(10))
LOSSES = {
    "vae_dtype": ({}, {"vae_dtype": "bf16"}),
    "latent_draw": ({}, {"latent_draw": "mean"}),
    "clip_skip": ({}, {"clip_skip": 2}),
    "max_tokens": ({}, {"max_tokens": 150}),
    "strict_tokens": ({}, {"strict_tokens": True}),
    "prediction": ({}, {"prediction": "v_prediction"}),
    "zero_terminal_snr": ({"prediction": "v_prediction"}, {"zero_terminal_snr": True}),
    "loss": ({}, HUBER),
    "huber_c": (HUBER, {"huber_c": 0.01}),
    "huber_schedule": (HUBER, {"huber_schedule": "constant"}),
    "offset_noise": ({}, {"offset_noise": 0.1}),
    "multires_iterations": ({}, {"multires_iterations": 3}),
    "multires_discount": ({"multires_iterations": 3}, {"multires_discount": 0.8}),
    "input_perturbation": ({}, {"input_perturbation": 0.1}),
    "timestep_range": ({}, {"timestep_range": [0.9, 1.0]}),
    "prior_target": ({}, {"prior_target": "base_model"}),
}
"""option → (settings, what is changed in them): the unweighted losses differ."""
WEIGHTS = {
    "loss_weighting": ({}, {"loss_weighting": "debiased"}),
    "loss_gamma": ({"loss_weighting": "min_snr"}, {"loss_gamma": 0.1}),
    "prior_weight": ({}, {"prior_weight": 0.3}),
    "prior_weight_end": ({}, {"prior_weight_end": 0.1}),
}
"""The same for what losses are multiplied by."""
_MODELS, _VERDICT = "tests/training/dreambooth/test_sd_models.py", "tests/training/dreambooth/test_verdict.py"
_SANITY = f"{_VERDICT}::test_the_sanity_prompt_is_drawn_as_the_first_preview_is"
BY_NAME = {
    "model": "test_another_model_or_part_of_it_has_other_losses",
    "vae": "test_another_model_or_part_of_it_has_other_losses",
    "tokenizer": "test_another_model_or_part_of_it_has_other_losses",
    "weights": f"{_MODELS}::test_the_running_average_of_a_file_is_taken_when_asked_for",
    "concepts": "tests/training/dreambooth/test_packing.py::"
    "test_each_picture_is_a_row_with_the_prompt_its_caption_repeats_and_weight",
    "train": "test_what_is_trained_has_gradients_and_nothing_else",
    "text_encoder_ratio": "test_the_ratio_of_text_training_makes_two_stages",
    "text_encoder_2_learning_rate": "test_each_part_has_its_rate",
    "freeze_clip_norms": "test_frozen_norms_stay_bit_for_bit_and_all_else_moves",
    "attention": "test_attention_is_computed_otherwise_with_the_same_result",
    "gradient_checkpointing": "test_checkpointing_keeps_less_and_gives_the_same_gradients",
    "sanity_prompt": _SANITY,
    "sanity_negative": _SANITY,
    "sanity_seed": _SANITY,
    "stages": "test_a_stage_changes_the_settings_of_its_chunk",
}
STAGE = {
    "epochs": (3, lambda config: config.data.epochs),
    "train": (["text_encoder"], lambda config: list(config.dreambooth.train)),
    "learning_rate": (2e-6, lambda config: config.optimizer.learning_rate),
    "text_encoder_learning_rate": (3e-6, lambda config: config.optimizer.text_encoder_learning_rate),
    "text_encoder_2_learning_rate": (4e-6, lambda config: config.dreambooth.text_encoder_2_learning_rate),
    "prior_weight": (0.3, lambda config: config.dreambooth.prior_weight),
    "prior_weight_end": (0.1, lambda config: config.dreambooth.prior_weight_end),
}
STAGE_BY_NAME = {
    "name": "test_a_stage_changes_the_settings_of_its_chunk",
    "concepts": "tests/training/dreambooth/test_packing.py::test_each_stage_has_its_chunk_with_its_concepts",
    "optimizer": "tests/training/dreambooth/test_carry_over.py::test_a_fresh_optimizer_forgets_all_moments",
}
BOTH = ["unet", "text_encoder"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: save_model(root / family, family) for family in ("sd1", "sdxl")}


@pytest.fixture(scope="module")
def sources(folders):
    return {family: load_model(sd_config(folder).of_dreambooth) for family, folder in folders.items()}


def captions_for(option):
    return (TAGS if option == "strict_tokens" else LONG, "a castle", "a dog")


@pytest.mark.parametrize("option", LOSSES)
def test_an_option_changes_the_loss(folders, sources, option):
    given, changes = LOSSES[option]
    reads_files = {"prediction", "zero_terminal_snr"} & {*given, *changes}
    batch = sd_batch(captions_for(option), classes=(2,), epoch=1)
    source = None if reads_files else sources["sd1"]
    plain, changed = (load_recipe(sd_config(folders["sd1"], **one), source=source) for one in (given, given | changes))

    before, after = losses_of(plain, batch), losses_of(changed, batch)

    assert after.isfinite().all() and (after - before).abs().max() > 1e-5
    if option == "strict_tokens":  # short captions are as they were
        torch.testing.assert_close(before[1:], after[1:])


@pytest.mark.parametrize("option", WEIGHTS)
def test_an_option_changes_what_a_sample_counts_and_not_its_loss(folders, sources, option):
    given, changes = WEIGHTS[option]
    batch = sd_batch(("rin", "a girl", "a dog"), classes=(1,), epoch=1)
    tables = {"data": {"workspace": "none", "epochs": 2}}
    before, after = (
        recipe.loss(recipe.trainable(), batch)
        for recipe in (
            load_recipe(sd_config(folders["sd1"], tables=tables, **one), source=sources["sd1"])
            for one in (given, given | changes)
        )
    )

    assert torch.equal(before.per_sample, after.per_sample)
    is_changed = (before.weights != after.weights).tolist()
    assert is_changed == [False, True, False] if option.startswith("prior") else any(is_changed)


def test_another_model_or_part_of_it_has_other_losses(folders, tmp_path):
    folder, batch = folders["sd1"], sd_batch()
    plain = losses_of(load_recipe(sd_config(folder)), batch)
    other = save_model(tmp_path / "other", "sd1", vae={"norm_num_groups": 16})
    torch.manual_seed(9)
    unet = toy_unet("sd1", layers_per_block=1)
    torch.nn.init.normal_(unet.conv_in.weight)
    unet.save_pretrained(other / "unet")
    load_tokenizer("builtin").save_pretrained(tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer.json"
    described = json.loads(path.read_text())
    vocabulary = described["model"]["vocab"]
    vocabulary["girl</w>"], vocabulary["castle</w>"] = vocabulary["castle</w>"], vocabulary["girl</w>"]
    path.write_text(json.dumps(described))

    for changes in (
        {"model": str(other)},
        {"vae": str(other / "vae")},
        {"tokenizer": str(tmp_path / "tokenizer")},
    ):
        assert (losses_of(load_recipe(sd_config(folder, **changes)), batch) - plain).abs().min() > 1e-6, changes


@pytest.mark.parametrize(
    ("family", "train"),
    [("sd1", ["unet"]), ("sd1", ["text_encoder"]), ("sd1", BOTH), ("sdxl", ["unet", "text_encoder_2"])],
    ids=str,
)
def test_what_is_trained_has_gradients_and_nothing_else(folders, sources, family, train):
    config = sd_config(folders[family], train=train)
    recipe = load_recipe(config, source=sources[family])

    weighted(recipe, sd_batch()).backward()

    prefixes = {"unet": "unet.", "text_encoder": "text.texts.0.", "text_encoder_2": "text.texts.1."}
    with_gradient = {name for name, one in recipe.trainable().named_parameters() if one.grad is not None}
    wanted = {
        name
        for name, one in recipe.trainable().named_parameters()
        if any(name.startswith(prefixes[part]) for part in train)
    }
    unread = {name for name in wanted - with_gradient if "layers.2." in name or "final_layer_norm" in name}
    assert with_gradient == wanted - unread
    assert not unread or family == "sdxl"
    assert all(one.requires_grad == (name in with_gradient) for name, one in recipe.trainable().named_parameters())
    assert (recipe.trainable().text is None) == (train == ["unet"])


def test_each_part_has_its_rate(folders, sources):
    train = ["unet", "text_encoder", "text_encoder_2"]
    tables = {"optimizer": {"learning_rate": 1e-3, "text_encoder_learning_rate": 1e-4}}
    given = {"train": train, "text_encoder_2_learning_rate": 1e-5}
    config = sd_config(folders["sdxl"], tables=tables, **given)
    recipe = load_recipe(config, source=sources["sdxl"])

    optimizer = train_step(recipe, config, sd_batch())

    rates = {group["part"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"unet": 1e-3, "text_encoder": 1e-4, "text_encoder_2": 1e-5}
    without = sd_config(folders["sdxl"], tables=tables, train=train)
    assert load_recipe(without, source=sources["sdxl"]).learning_rates()["text_encoder_2"] == 1e-4


def test_the_ratio_of_text_training_makes_two_stages():
    tables = {"data": {"workspace": "none", "epochs": 10}}
    config = sd_config("none", tables=tables, concepts="c.toml", train=BOTH, text_encoder_ratio=0.34)

    found = [(one.chunk, one.epochs, stage_config(config, one.chunk).dreambooth.train) for one in stages_of(config)]

    assert found == [("concepts/01-with-text", 3, tuple(BOTH)), ("concepts/02-without-text", 7, ("unet",))]
    never = sd_config("none", tables=tables, concepts="c.toml", train=BOTH, text_encoder_ratio=0)
    assert never.dreambooth.train == ("unet",) and [one.chunk for one in stages_of(never)] == ["concepts/01-all"]
    always = sd_config("none", tables=tables, concepts="c.toml", train=BOTH)
    assert [(one.chunk, one.epochs) for one in stages_of(always)] == [("concepts/01-all", 10)]


@pytest.mark.parametrize("option", STAGE)
def test_a_stage_changes_the_settings_of_its_chunk(option):
    value, read = STAGE[option]
    train = ["unet", "text_encoder", "text_encoder_2"]
    stages = [{"name": "parts", "epochs": 1}, {"name": "whole", "epochs": 2, option: value}]
    config = sd_config("none", concepts="c.toml", train=train, stages=stages)
    chunks = [one.chunk for one in stages_of(config)]

    first, second = (stage_config(config, chunk) for chunk in chunks)

    assert chunks == ["concepts/01-parts", "concepts/02-whole"]
    assert read(second) == value != read(first)
    assert read(first) == (1 if option == "epochs" else read(config))
    changed = {"epochs": "data", "learning_rate": "optimizer", "text_encoder_learning_rate": "optimizer"}
    tables = {name for name, _ in first if getattr(first, name) != getattr(second, name)}
    assert tables == {changed.get(option, "dreambooth")} | ({"data"} if option != "epochs" else set())


def test_every_option_has_its_test():
    here = Path(__file__).relative_to(ROOT).as_posix()

    assert {*LOSSES, *WEIGHTS, *BY_NAME} == set(DreamBoothConfig.model_fields)
    assert {*STAGE, *STAGE_BY_NAME} == set(StageConfig.model_fields)
    for name in {*BY_NAME.values(), *STAGE_BY_NAME.values()}:
        path, _, test = name.rpartition("::")
        places = [path] if path else [here, "tests/training/recipes/test_dreambooth_parts.py"]
        texts = [(ROOT / place).read_text() for place in places]
        assert any(re.search(rf"^def {test}\(", text, re.MULTILINE) for text in texts), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_skip": 0}, "clip_skip"),
        ({"max_tokens": 100}, "75, 150 or 225"),
        ({"text_encoder_ratio": 1.5}, "text_encoder_ratio"),
        ({"text_encoder_ratio": 0.5}, "would not be read: `train` names no text encoder"),
        ({"text_encoder_ratio": 0.5, "train": BOTH}, "would not be read: .*`concepts` is not given"),
        ({"text_encoder_ratio": 0.5, "train": ["text_encoder"], "concepts": "c.toml"}, "names text encoders only"),
        ({"text_encoder_ratio": 0, "train": ["text_encoder"], "concepts": "c.toml"}, "names text encoders only"),
        ({"text_encoder_ratio": 0.2, "train": BOTH, "concepts": "c.toml"}, "of data.epochs 1 is not one whole epoch"),
        ({"timestep_range": [0.5, 0.2]}, "none of the 1,000 timesteps lies there"),
        ({"timestep_range": [0.9999, 1.0]}, "none of the 1,000 timesteps lies there"),
        ({"huber_c": 0.2}, 'huber_c 0.2 would not be read: loss is "l2"'),
        ({"huber_schedule": "constant"}, "would not be read"),
        ({"loss_gamma": 5.0}, 'loss_weighting must be "min_snr" or "p2"'),
        ({"multires_discount": 0.5}, "multires_iterations is 0"),
        ({"freeze_clip_norms": True}, "`train` names no text encoder"),
        ({"text_encoder_2_learning_rate": 1e-5, "train": BOTH}, "`train` does not name text_encoder_2"),
        ({"stages": [{"name": "a", "epochs": 1}]}, "`concepts` is not given"),
        ({"concepts": "c", "stages": [{"name": "a", "epochs": 1}] * 2}, "two are named 'a'"),
        (
            {"concepts": "c", "stages": [{"name": "a", "epochs": 1, "text_encoder_learning_rate": 1e-6}]},
            "'a' has a text_encoder_learning_rate, but trains no text encoder",
        ),
        (
            {"concepts": "c", "train": BOTH,
             "stages": [{"name": "a", "epochs": 1, "text_encoder_2_learning_rate": 1e-6}]},
            "'a' has a text_encoder_2_learning_rate, but does not train text_encoder_2",
        ),
        ({"prediction": "epsilon", "zero_terminal_snr": True}, "pure noise says nothing about epsilon"),
        ({"train": []}, "at least 1"),
        ({"no_such_option": 1}, "no_such_option"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused_with_the_reason(changes, message):
    with pytest.raises(ValidationError, match=message):
        sd_config("none", **changes)


def test_settings_that_do_not_fit_the_model_are_refused(folders, sources):
    for changes, message in (
        ({"train": ["unet", "text_encoder_2"]}, "has one text encoder: only SDXL has two"),
        ({"clip_skip": 4, "train": ["unet"]}, r"dreambooth.clip_skip 4: the text model has 3 layers"),
        ({"attention": "xformers"}, r'dreambooth.attention "xformers": .*"sdpa" needs no package'),
    ):
        if changes.get("attention") == "xformers" and torch.cuda.is_available():
            continue
        with pytest.raises(ValueError, match=f"(?s){message}"):
            load_recipe(sd_config(folders["sd1"], **changes), source=sources["sd1"])
    with pytest.raises(ValueError, match="predicts epsilon"):
        load_recipe(sd_config(folders["sd1"], zero_terminal_snr=True))
