"""The table of kohya's flags: complete, and never about a key of run.toml that is not there."""

import pytest
from pydantic import BaseModel

from sharding.config import ConfigError
from training.config import RunConfig
from training.kohya.flag_table import SCRIPTS, launcher_flags, trainer_flags

OF_STAGE_C = {
    "mixed_precision", "save_precision", "full_fp16", "full_bf16", "sdpa", "gradient_checkpointing",
    "train_text_encoder", "resolution", "train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "learning_rate_te1", "lr_scheduler", "lr_warmup_steps", "optimizer_type", "optimizer_args", "max_grad_norm",
    "token_warmup_min", "token_warmup_step", "shuffle_caption", "caption_separator", "caption_dropout_rate",
    "caption_tag_dropout_rate", "caption_dropout_every_n_epochs", "dataset_repeats", "save_state",
    "save_every_n_steps", "sample_every_n_steps", "max_token_length", "max_train_epochs", "caption_extension",
    "max_data_loader_n_workers", "persistent_data_loader_workers", "enable_bucket", "min_bucket_reso",
    "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale", "log_with", "output_name", "output_dir",
    "train_data_dir", "in_json", "logging_dir", "resume", "stage_c_checkpoint_path", "text_model_checkpoint_path",
    "effnet_checkpoint_path", "previewer_checkpoint_path", "sample_prompts", "save_text_model",
    "adaptive_loss_weight", "tokenizer_cache_dir", "no_half_vae", "cache_latents", "cache_latents_to_disk",
    "vae_batch_size", "cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk", "dataset_config",
    "dataset_class", "debug_dataset", "flip_aug", "color_aug", "random_crop", "face_crop_aug_range", "keep_tokens",
    "keep_tokens_separator", "caption_prefix", "caption_suffix", "reg_data_dir", "prior_loss_weight",
    "max_train_steps", "seed", "save_every_n_epochs", "save_n_epoch_ratio", "save_last_n_epochs",
    "save_last_n_epochs_state", "save_last_n_steps", "save_last_n_steps_state", "save_model_as", "use_safetensors",
    "huggingface_repo_id", "huggingface_repo_type", "huggingface_path_in_repo", "huggingface_token",
    "huggingface_repo_visibility", "save_state_to_huggingface", "resume_from_huggingface", "async_upload",
    "xformers", "mem_eff_attn", "torch_compile", "dynamo_backend", "lowram", "highvram", "ddp_timeout",
    "ddp_gradient_as_bucket_view", "ddp_static_graph", "lr_scheduler_num_cycles", "lr_scheduler_power",
    "lr_scheduler_type", "lr_scheduler_args", "use_8bit_adam", "use_lion_optimizer", "sample_at_first",
    "sample_every_n_epochs", "sample_sampler", "log_prefix", "log_tracker_name", "log_tracker_config",
    "wandb_run_name", "wandb_api_key", "noise_offset", "multires_noise_iterations", "multires_noise_discount",
    "ip_noise_gamma", "adaptive_noise_scale", "zero_terminal_snr", "min_timestep", "max_timestep", "clip_skip",
    "vae", "fp8_base", "perlin_noise", "metadata_title", "metadata_author", "metadata_description",
    "metadata_license", "metadata_tags", "config_file", "output_config", "console_log_level", "console_log_file",
    "console_log_simple",
}  # fmt: skip
OF_MAIN = {
    "secondary_separator", "enable_wildcard", "resize_interpolation", "alpha_mask", "validation_split",
    "validation_seed", "cache_info", "deepspeed", "zero_stage", "offload_optimizer_device", "offload_param_device",
    "zero3_init_flag", "zero3_save_16bit_model", "fp16_master_weights_and_gradients", "fused_backward_pass",
    "fused_optimizer_groups", "block_lr", "initial_epoch", "initial_step", "skip_until_initial_step",
    "disable_mmap_load_safetensors", "save_state_on_train_end", "pretrained_model_name_or_path", "v2",
    "v_parameterization", "learning_rate_te", "learning_rate_te2", "stop_text_encoder_training", "no_token_padding",
    "unet_lr", "text_encoder_lr", "network_module", "network_dim", "network_alpha", "network_dropout",
    "network_args", "network_weights", "min_snr_gamma", "debiased_estimation_loss", "loss_type", "huber_c",
    "huber_schedule", "weighted_captions", "masked_loss",
}  # fmt: skip


def keys_of(table: type[BaseModel], prefix: str = "") -> set[str]:
    keys = set()
    for name, field in table.model_fields.items():
        keys.add(prefix + name)
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys |= keys_of(kind, f"{prefix}{name}.")
    return keys


def test_all_flags_of_the_reference_are_there():
    assert set(trainer_flags()) >= OF_STAGE_C | OF_MAIN
    stage_c = {name for name, flag in trainer_flags().items() if flag.is_in("stage_c")}
    assert stage_c >= OF_STAGE_C
    assert not {"network_dim", "min_snr_gamma", "deepspeed", "enable_wildcard", "learning_rate_te"} & stage_c


@pytest.mark.parametrize("flags", [trainer_flags(), launcher_flags()], ids=["trainers", "launcher"])
def test_every_key_that_the_table_names_is_one_of_run_toml(flags):
    known = keys_of(RunConfig)
    for name, flag in flags.items():
        for key in (flag.key, flag.to):
            table = key.removesuffix(".*")
            assert not key or table in known, f"{name}: {key}"


def test_every_line_says_what_it_means_here_and_what_kohya_did():
    for name, flag in [*trainer_flags().items(), *launcher_flags().items()]:
        assert flag.here and flag.kohya, name
        assert flag.here.endswith((".", ")")) and flag.kohya.endswith((".", ")")), name


def test_a_script_without_the_flag_is_said_to_refuse_it():
    flag = trainer_flags()["network_dim"]

    assert flag.done_by("stage_c").startswith("This script has no such flag")
    assert "no such flag" not in flag.done_by("network")
    assert set(SCRIPTS.values()) == {"stage_c", "stage_c_network", "db", "fine_tune", "network", "sdxl", "sdxl_network"}


@pytest.mark.parametrize(
    ("name", "words", "expected"),
    [
        ("learning_rate", ["1e-5"], 1e-5),
        ("lr_warmup_steps", ["0.1"], 0.1),
        ("lr_warmup_steps", ["100"], 100),
        ("resolution", [[512, 768]], "512,768"),
        ("optimizer_args", "a=1 b=2", ["a=1", "b=2"]),
        ("full_fp16", True, True),
    ],
)
def test_values_are_read_as_argparse_would(name, words, expected):
    value = trainer_flags()[name].read(name, words)

    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("name", "words", "expected"),
    [
        ("train_batch_size", ["two"], "--train_batch_size: must be a number, got 'two'"),
        ("train_batch_size", ["1.5"], "--train_batch_size: must be a whole number, got '1.5'"),
        ("full_fp16", "yes", "--full_fp16: is a switch, got the value 'yes'"),
    ],
)
def test_values_of_the_wrong_kind_are_refused(name, words, expected):
    with pytest.raises(ConfigError, match=expected):
        trainer_flags()[name].read(name, words)
