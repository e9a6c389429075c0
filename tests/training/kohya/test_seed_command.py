"""The seed's literal command: what every one of its flags changes in run.toml, or where else it goes."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from sharding.config import parse_config
from training.config import RunConfig
from training.kohya.explanation import Explanation, explain
from training.kohya.run_toml import run_toml
from training.kohya.sources import given_by_command

SEED = Path(__file__).with_name("seed_command.sh").read_text(encoding="utf-8")
LAUNCHER = "accelerate launch --mixed_precision fp16 --num_cpu_threads_per_process 1"
REMOVED = None

# flag, what it is replaced by, {key of run.toml: value with the seed's, value then}
CHANGES: list[tuple[str, str | None, dict[str, tuple[Any, Any]]]] = [
    ("mixed_precision", "bf16", {"precision.autocast": ("fp16", "bf16")}),
    ("save_precision", "float", {"save.export_dtype": ("fp16", "fp32")}),
    ("full_fp16", REMOVED, {"precision.weights": ("fp16", "fp32")}),
    ("sdpa", REMOVED, {"stage_c.attention_dropout": ("probabilities", "none")}),
    ("gradient_checkpointing", REMOVED, {"stage_c.gradient_checkpointing": (True, False)}),
    ("train_text_encoder", REMOVED, {"stage_c.train_text_encoder": (True, False)}),
    ("resolution", '"768,512"', {"buckets.resolution": ([1024, 1024], [768, 512])}),
    ("train_batch_size", "4", {"batch.micro_batch_size": (2, 4), "batch.batch_size": (16, 32)}),
    ("gradient_accumulation_steps", "3", {"batch.batch_size": (16, 6)}),
    ("learning_rate", "2e-5", {"optimizer.learning_rate": (1e-5, 2e-5)}),
    ("learning_rate_te1", "5e-6", {"optimizer.text_encoder_learning_rate": (1e-5, 5e-6)}),
    ("lr_scheduler", "constant",
     {"schedule.name": ("constant_with_warmup", "constant"), "schedule.warmup_steps": (100, None)}),
    ("lr_warmup_steps", "7", {"schedule.warmup_steps": (100, 7)}),
    ("optimizer_type", "lion",
     {"optimizer.name": ("adafactor", "lion"), "optimizer.adafactor_clip_threshold": (1.0, None)}),
    ("optimizer_args", '"scale_parameter=False" "relative_step=False" "warmup_init=False" "clip_threshold=2.0"',
     {"optimizer.adafactor_clip_threshold": (1.0, 2.0)}),
    ("max_grad_norm", "1.5", {"optimizer.max_grad_norm": (0.0, 1.5)}),
    ("token_warmup_min", "3", {"caption.token_warmup_min": (1, 3)}),
    ("token_warmup_step", "50", {"caption.token_warmup_steps": (0, 50)}),
    ("shuffle_caption", REMOVED, {"caption.shuffle": (True, False)}),
    ("caption_separator", '"|"', {"caption.separator": (", ", "|")}),
    ("caption_dropout_rate", "0.05", {"caption.caption_dropout_fraction": (0.0, 0.05)}),
    ("caption_tag_dropout_rate", "0.1", {"caption.tag_dropout_fraction": (0.0, 0.1)}),
    ("caption_dropout_every_n_epochs", "4", {"caption.caption_dropout_every_epochs": (0, 4)}),
    ("dataset_repeats", "3", {"data.epochs": (1, 3)}),
    ("save_every_n_steps", "100", {"save.every_steps": (256, 100)}),
    ("sample_every_n_steps", "32", {"preview.every_steps": (64, 32)}),
    ("max_token_length", "150", {"stage_c.max_tokens": (225, 150)}),
    ("max_train_epochs", "2", {"data.epochs": (1, 2)}),
    ("max_data_loader_n_workers", "6", {"data.workers": (2, 6)}),
    ("enable_bucket", REMOVED,
     {"buckets.family": ("no_upscale", "ratios"), "buckets.ratios": (None, [1.0]), "buckets.step": (64, 32)}),
    ("bucket_reso_steps", "32", {"buckets.step": (64, 32)}),
    ("bucket_no_upscale", REMOVED,
     {"buckets.family": ("no_upscale", "area"), "buckets.min_side": (None, 256), "buckets.max_side": (None, 4096)}),
    ("log_with", "wandb",
     {"trackers.tensorboard": (True, False), "trackers.wandb": (None, "online"),
      "trackers.wandb_project": (None, "finetuning")}),
    ("output_name", "mine", {"name": ("sotediffusion-wr3_3b", "mine")}),
    ("stage_c_checkpoint_path", "c.safetensors", {"stage_c.network": (..., "c.safetensors")}),
    ("text_model_checkpoint_path", "t.safetensors", {"stage_c.text_encoder": (..., "t.safetensors")}),
    ("effnet_checkpoint_path", "e.safetensors", {"stage_c.effnet": (..., "e.safetensors")}),
    ("previewer_checkpoint_path", REMOVED, {"stage_c.previewer": (..., None)}),
    ("sample_prompts", "p.txt", {"preview.file": (..., "p.txt")}),
    ("num_cpu_threads_per_process", "4", {"precision.num_threads": (1, 4)}),
    # Of these kohya itself makes no use here; their lines are in run.toml as comments.
    ("min_bucket_reso", "512", {}),
    ("max_bucket_reso", "2048", {}),
]  # fmt: skip

# flag, what it is replaced by, what its line says, what the commands hold (before, after)
ELSEWHERE: list[tuple[str, str | None, str, tuple[str, str]]] = [
    ("save_state", REMOVED, "Always so: a state at every save.every_steps", ("", "")),
    ("caption_extension", ".caption", "`sharding import-kohya` reads .txt", ("", "")),
    ("persistent_data_loader_workers", REMOVED, "Always so: workers live as long as the chunk", ("", "")),
    ("train_data_dir", "/mine", "Pictures become chunks first", ("combined-0004/0005 --output", "/mine --output")),
    ("in_json", "/mine.json", "`sharding import-kohya --metadata`", ("/0005.json", "--metadata /mine.json")),
    ("output_dir", "/runs/mine", "--run-dir of the commands", ("wr3_3b-4/run", "--run-dir /runs/mine")),
    ("logging_dir", REMOVED, "Files go to RUN/tensorboard", ("", "")),
    ("resume", "/mine-state", "taken over by `training import-state`", ("3b-state run.toml", "/mine-state run.toml")),
]  # fmt: skip


def explained(text: str) -> Explanation:
    return explain(given_by_command(text), workspace="w", chunks="kohya/*")


def with_flag(flag: str, value: str | None) -> str:
    """The seed's command with another value for a flag, or without it."""
    if flag == "num_cpu_threads_per_process":
        return SEED.replace(f"--{flag} 1", f"--{flag} {value}")
    lines = SEED.splitlines()
    place = next(number for number, line in enumerate(lines) if line.split()[0] == f"--{flag}")
    lines[place : place + 1] = [f"--{flag} {value} \\"] if value is not None else []
    return "\n".join([*lines[:-1], lines[-1].removesuffix("\\")])


def flat(tables: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tables.items():
        found.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return found


def row_of(explanation: Explanation, flag: str):
    titles = (f"accelerate --{flag}",) if flag == "num_cpu_threads_per_process" else (f"--{flag}",)
    return next(row for row in explanation.rows if row.flag in titles)


@pytest.mark.parametrize(("flag", "value", "expected"), CHANGES, ids=[change[0] for change in CHANGES])
def test_a_flag_of_the_seed_changes_run_toml(flag, value, expected):
    before, after = explained(SEED), explained(with_flag(flag, value))
    was, now = flat(before.values()), flat(after.values())

    changed = {key: (was.get(key), now.get(key)) for key in {*was, *now} if was.get(key) != now.get(key)}

    assert set(changed) == set(expected)
    for key, (old, new) in expected.items():
        assert changed[key][1] == new
        assert old is ... or changed[key][0] == old
        if old is not None:
            told = [line for line in row_of(before, flag).here if line.removeprefix("# ").startswith(f"{key} = ")]
            assert told or key.startswith(("buckets.step", "schedule.warmup", "trackers.wandb", "optimizer.adafactor"))


@pytest.mark.parametrize(("flag", "value"), [("min_bucket_reso", "512"), ("max_bucket_reso", "2048")])
def test_what_kohya_ignored_is_a_comment_in_run_toml(flag, value):
    key = {"min_bucket_reso": "min_side", "max_bucket_reso": "max_side"}[flag]

    text = run_toml(explained(with_flag(flag, value)))

    assert f"\n# {key} = {value}  # --{flag}: kohya ignores it with --bucket_no_upscale" in text
    assert f"# buckets.{key} = {value}" in row_of(explained(with_flag(flag, value)), flag).here


@pytest.mark.parametrize(("flag", "value", "told", "commands"), ELSEWHERE, ids=[one[0] for one in ELSEWHERE])
def test_a_flag_that_run_toml_has_no_key_for_says_where_it_goes(flag, value, told, commands):
    before, after = explained(SEED), explained(with_flag(flag, value))

    assert before.values() == after.values()
    assert told in " ".join(row_of(before, flag).here)
    assert commands[0] in "\n".join(before.commands)
    assert commands[1] in "\n".join(after.commands)


def test_the_allocator_in_front_stays_in_front():
    explanation = explained(SEED)

    assert explanation.commands[-1].startswith("LD_PRELOAD=/usr/lib/libtcmalloc.so.4 python -m training run run.toml")
    assert "LD_PRELOAD" not in explained(SEED.replace("LD_PRELOAD=/usr/lib/libtcmalloc.so.4 ", "")).commands[-1]


def test_every_flag_of_the_seed_is_tested_above():
    given = given_by_command(SEED)

    tested = {one[0] for one in CHANGES} | {one[0] for one in ELSEWHERE}

    assert tested == {*given.flags, *given.launcher}
    assert given.environment == {"LD_PRELOAD": "/usr/lib/libtcmalloc.so.4"}
    assert len(given.flags) == 49 and len(given.launcher) == 2


def test_the_seeds_command_is_understood_without_remainder():
    explanation = explained(SEED)

    config = parse_config(tomllib.loads(run_toml(explanation)), RunConfig, name="run.toml")

    assert not explanation.unknown and not explanation.problems and not explanation.notes
    assert config.stage_c.encode_scale == 1.0
    assert config.stage_c.attention_mask is False
    assert config.caption.compat == "kohya"
    assert [one.key for one in explanation.without_flag] == ["caption.compat", "stage_c.attention_mask"]


def test_eight_processes_make_a_larger_step_and_the_table_says_what_became_of_the_warm_up():
    explanation = explained(SEED.replace(LAUNCHER, f"{LAUNCHER} --num_processes 8"))

    assert explanation.values()["batch"]["batch_size"] == 128
    assert explanation.values()["schedule"]["warmup_steps"] == 100
    assert "(on 8 processes kohya's was over after 12.5 steps)" in row_of(explanation, "lr_warmup_steps").here
    assert "--num_processes 8" in explanation.commands[-1] and "--processes 8" in explanation.commands[-1]
