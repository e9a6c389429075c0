"""Flags that the seed's command has not: the settings they become, and those that cannot be had here."""

import tomllib
from typing import Any

import pytest

from sharding.config import parse_config
from training.config import RunConfig
from training.kohya.explanation import Explanation, explain
from training.kohya.run_toml import run_toml
from training.kohya.sources import given_by_command

NETWORKS = "--stage_c_checkpoint_path c.safetensors --effnet_checkpoint_path e.safetensors"
STAGE_C = f"python stable_cascade_train_stage_c.py {NETWORKS} --resolution 1024 --max_train_epochs 1"
LORA = f"python stable_cascade_train_c_network.py {NETWORKS} --resolution 1024 --network_module networks.lora"


def explained(command: str, *overrides: str) -> Explanation:
    return explain(given_by_command(command), workspace="w", chunks="kohya/*", overrides=overrides)


def value_at(values: dict[str, Any], key: str) -> Any:
    for name in key.split("."):
        values = values.get(name, {})
    return values


def config_of(explanation: Explanation) -> RunConfig:
    return parse_config(tomllib.loads(run_toml(explanation)), RunConfig, name="run.toml")


def test_kohyas_defaults_are_written_where_ours_are_others():
    config = config_of(explained(STAGE_C))

    assert config.optimizer.name == "adamw"
    assert config.optimizer.learning_rate == 2e-6
    assert config.optimizer.weight_decay == 0.01 and config.optimizer.decay_vectors is True
    assert config.optimizer.max_grad_norm == 1.0
    assert config.schedule.name == "constant"
    assert config.precision.autocast == "no"
    assert config.batch.batch_size == config.batch.micro_batch_size == 1
    assert config.buckets.family == "ratios" and config.buckets.ratios == (1.0,)
    assert config.caption.shuffle is False and config.caption.separator == ","
    assert config.save.export_dtype == "fp32"
    assert config.stage_c.max_tokens == 75 and config.stage_c.attention_dropout == "none"
    assert config.stage_c.text_encoder == "stabilityai/stable-cascade-prior"
    assert config.trackers.tensorboard is False
    assert config.preview.at_chunk_end is False


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        ("--full_bf16 --mixed_precision bf16", "precision.weights", "bf16"),
        ("--adaptive_loss_weight", "stage_c.loss_weighting", "adaptive"),
        ("--seed 7", "seed", 7),
        ("--flip_aug", "data.horizontal_flip", True),
        ("--random_crop", "data.crop", "random"),
        ("--color_aug", "data.colour_jitter.hue", 0.044),
        ("--keep_tokens 2", "caption.keep_first_tags", 2),
        ('--keep_tokens_separator "|||"', "caption.keep_separator", "|||"),
        ("--caption_prefix art", "caption.prefix", "art"),
        ("--caption_suffix end", "caption.suffix", "end"),
        ("--lr_scheduler piecewise_constant --lr_scheduler_args step_rules=1:10,0.1", "schedule.rules", "1:10,0.1"),
        ("--use_8bit_adam", "optimizer.name", "adamw8bit"),
        ("--use_lion_optimizer", "optimizer.name", "lion"),
        ("--optimizer_type PagedAdamW8bit", "optimizer.name", "adamw8bit"),
        ("--optimizer_type AdamW --optimizer_args betas=(0.8,0.99) weight_decay=0.1", "optimizer.betas", (0.8, 0.99)),
        ("--optimizer_type AdamW --optimizer_args weight_decay=0.1", "optimizer.weight_decay", 0.1),
        ("--optimizer_type Prodigy --learning_rate 1 --optimizer_args d_coef=2 decouple=True weight_decay=0.01 "
         "safeguard_warmup=True", "optimizer.prodigy_d_coef", 2),
        ("--optimizer_type AdamWScheduleFree", "optimizer.name", "schedule_free"),
        ("--learning_rate 0 --train_text_encoder --learning_rate_te1 1e-6", "optimizer.freeze", ["network.*"]),
        ("--learning_rate 0 --train_text_encoder --learning_rate_te1 1e-6", "optimizer.learning_rate", 1e-6),
        ("--torch_compile", "compile", "inductor"),
        ("--save_last_n_steps_state 600 --save_every_n_steps 256", "save.keep_states", 3),
        ("--previewer_checkpoint_path v --sample_prompts p.txt --sample_every_n_epochs 1 --sample_every_n_steps 9",
         "preview.at_chunk_end", True),
        ("--previewer_checkpoint_path v --sample_prompts p.txt --sample_every_n_epochs 1 --sample_every_n_steps 9",
         "preview.every_steps", 0),
        ("--logging_dir logs", "trackers.tensorboard", True),
        ("--log_with all --log_tracker_name mine", "trackers.wandb_project", "mine"),
        ("--enable_bucket", "buckets.max_side", 1024),
        ("--cache_latents", "latents.use", True),
        ("--cache_text_encoder_outputs_to_disk", "latents.text", True),
        ("--metadata_author me", "save.modelspec.author", "me"),
        ('--output_name "a/b: c"', "name", "a-b- c"),
    ],
)  # fmt: skip
def test_a_flag_becomes_a_setting(words, key, value):
    explanation = explained(f"{STAGE_C} {words}")

    assert not explanation.problems
    assert value_at(explanation.values(), key) == value
    config_of(explanation)


def test_steps_without_epochs_are_the_horizon_of_a_falling_schedule():
    command = STAGE_C.replace("--max_train_epochs 1", "--max_train_steps 500")

    schedule = config_of(
        explained(f"{command} --lr_scheduler polynomial --lr_scheduler_power 2 --lr_warmup_steps 9")
    ).schedule

    assert (schedule.name, schedule.total_steps, schedule.power, schedule.warmup_steps) == ("polynomial", 500, 2.0, 9)


def test_settings_of_the_launcher():
    explanation = explained(
        STAGE_C.replace("python", "accelerate launch --num_processes 4 --use_fsdp --num_cpu_threads_per_process 3")
    )

    config = config_of(explanation)

    assert (config.batch.batch_size, config.parallel.strategy, config.precision.num_threads) == (4, "fsdp2", 3)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--noise_offset 0.05", "# offset_noise = 0.05"),
        ("--min_timestep 100", "# timestep_range = [0.1, 1.0]"),
        ("--max_timestep 900", "# timestep_range = [0.0, 0.9]"),
        ("--save_last_n_epochs 3", "# keep_exports = 3"),
    ],
)
def test_what_the_branch_ignores_is_offered_as_a_comment(words, line):
    explanation = explained(f"{STAGE_C} {words}")
    text = run_toml(explanation)

    assert f"\n{line}" in text
    assert config_of(explanation) == config_of(explained(STAGE_C))
    alive = "\n".join(
        one.removeprefix("# ").split("  # ")[0] if one.startswith(line) else one for one in text.splitlines()
    )
    assert parse_config(tomllib.loads(alive), RunConfig, name="x") != config_of(explanation)  # it is a setting of ours


@pytest.mark.parametrize(
    ("words", "expected", "override"),
    [
        ("--optimizer_type DAdaptAdam", "DAdaptAdam is not here: Prodigy is its successor", "optimizer.name='lion'"),
        ("--optimizer_type adafactor", "relative_step=True is not here", "optimizer.name='adafactor'"),
        ("--optimizer_type AdamW --optimizer_args amsgrad=True", "amsgrad=True is not here", "optimizer.name='adamw'"),
        ("--lr_scheduler cosine", "cosine needs the steps of the whole run", "schedule.total_steps=1000"),
        ("--lr_scheduler adafactor:1e-5", "adafactor:1e-5 is not here", "schedule.name='constant'"),
        ("--lr_scheduler_type torch.X", "torch.X is not here", "schedule.name='constant'"),
        ("--learning_rate 0", "nothing would be trained", "optimizer.learning_rate=1e-5"),
        ("--full_fp16", "needs --mixed_precision fp16", None),
        ("--torch_compile --dynamo_backend onnxrt", "onnxrt is not here", "compile='no'"),
    ],
)
def test_what_cannot_be_had_is_refused_until_it_is_settled(words, expected, override):
    explanation = explained(f"{STAGE_C} {words}")

    assert any(expected in problem.text for problem in explanation.problems)
    with pytest.raises(ValueError, match=r"^--"):
        run_toml(explanation)
    if override is not None:
        config_of(explained(f"{STAGE_C} {words}", override))


def test_missing_paths_and_sizes_are_named():
    explanation = explained("python stable_cascade_train_stage_c.py --resolution 1,2,3")

    assert {one.flag for one in explanation.problems} == {
        "stage_c_checkpoint_path",
        "effnet_checkpoint_path",
        "resolution",
    }


def test_an_override_replaces_a_value_and_may_add_one():
    text = run_toml(explained(STAGE_C, "data.chunks=['a/*']", "ema.enabled=true", "batch.batch_size=8"))

    assert 'chunks = ["a/*"]  # --set' in text
    assert "[ema]\nenabled = true  # --set" in text
    assert "batch_size = 8  # --set" in text and "batch_size = 1" in text


def test_no_epochs_means_that_somebody_has_to_choose():
    row = next(
        row for row in explained(STAGE_C.replace("--max_train_epochs 1", "--max_train_steps 900")).rows
        if row.flag == "--max_train_steps"
    )  # fmt: skip

    assert "data.epochs = 1" in row.here
    assert any("kohya: 900 steps, however many pictures there are" in line for line in row.here)


def test_the_branchs_lora_trainer_becomes_lora_settings():
    explanation = explained(f"{LORA} --network_dim 16 --network_alpha 8 --unet_lr 1e-4 --text_encoder_lr 5e-5")
    config = config_of(explanation)

    assert config.lora is not None
    assert (config.lora.rank, config.lora.alpha, config.lora.targets) == (16, 8.0, ("kohya",))
    assert config.lora.text_encoder is not None and config.lora.text_encoder.rank == 16
    assert config.optimizer.learning_rate == 1e-4 and config.optimizer.text_encoder_learning_rate == 5e-5
    only = config_of(explained(f"{LORA} --network_train_unet_only --network_weights a.safetensors"))
    assert only.lora is not None
    assert only.lora.text_encoder is None and only.lora.init == "a.safetensors" and only.lora.rank == 4


@pytest.mark.parametrize(
    ("words", "kind"), [("algo=loha", "loha"), ("algo=lokr", "lokr"), ("algo=lora dora_wd=True", "dora")]
)
def test_lycoris_kinds_are_kinds_of_lora(words, kind):
    command = LORA.replace("networks.lora", "lycoris.kohya")
    explanation = explained(f"{command} --network_args {words}")

    assert not explanation.problems
    assert config_of(explanation).lora.kind == kind  # type: ignore[union-attr]


@pytest.mark.parametrize("words", ["--network_args conv_dim=4", "--network_train_text_encoder_only"])
def test_lora_that_is_not_here_is_refused(words):
    assert explained(f"{LORA} {words}").problems
