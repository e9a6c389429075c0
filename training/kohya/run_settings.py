"""From kohya's flags to the rest of run.toml: name, saving, previews, trackers, latents, and the recipe stage_c."""

from pathlib import Path

from sharding.config import check_name
from training.kohya.data_settings import batch_settings, bucket_settings, caption_settings, data_settings
from training.kohya.given import Given
from training.kohya.lora_settings import lora_settings
from training.kohya.optimizer_settings import (
    optimizer_settings,
    parallel_settings,
    precision_settings,
    schedule_settings,
)
from training.kohya.setting import Translation

_TEXT_MODEL = "stabilityai/stable-cascade-prior"
_EXPORT = {"fp16": "fp16", "bf16": "bf16", "float": "fp32"}
_MAX_STEP = 1000


def shared_settings(given: Given, *, workspace: str, chunks: str) -> Translation:
    """Return what every recipe has, from any of the scripts."""
    found = Translation()
    name = run_name(given)
    found.put("name", name, "output_name", why="" if name == given.value("output_name") else "letters, digits, - _ .")
    if given.value("seed") is not None:
        found.put("seed", abs(given.value("seed")), "seed")
    else:
        found.put("seed", 0, "seed", why="kohya: random in every process")
    if given.launcher.get("cpu"):
        found.put("device", "cpu", "cpu")
    _compile(given, found)
    data_settings(given, found, workspace=workspace, chunks=chunks)
    batch_settings(given, found)
    bucket_settings(given, found)
    caption_settings(given, found)
    _latents(given, found)
    optimizer_settings(given, found)
    schedule_settings(given, found)
    precision_settings(given, found)
    parallel_settings(given, found)
    _saving(given, found)
    _watching(given, found)
    return found


def run_name(given: Given) -> str:
    """Return --output_name in letters that a run's name may have; kohya's own default is `last`."""
    written = str(given.value("output_name") or "kohya")
    name = "".join(letter if letter.isalnum() or letter in "-_. " else "-" for letter in written).strip(" .") or "kohya"
    return check_name(" ".join(name.split()))


def stage_c_settings(given: Given, *, workspace: str, chunks: str) -> Translation:
    """Return all settings for a command of the stable-cascade branch."""
    found = shared_settings(given, workspace=workspace, chunks=chunks)
    _networks(given, found)
    if given.script == "stage_c_network":
        lora_settings(given, found)
    found.put("stage_c.train_text_encoder", given.has("train_text_encoder"), "train_text_encoder")
    found.put("stage_c.max_tokens", given.value("max_token_length") or 75, "max_token_length")
    found.put("stage_c.attention_mask", False, why="kohya encodes padding without a mask")
    why = "kohya feeds EffNet the pixels of --resolution: 32 × 32 latents for 1024²; official 0.75"
    found.put("stage_c.encode_scale", 1.0, "resolution", why=why)
    weighting = "adaptive" if given.has("adaptive_loss_weight") else "p2"
    found.put("stage_c.loss_weighting", weighting, "adaptive_loss_weight")
    found.put("stage_c.gradient_checkpointing", given.has("gradient_checkpointing"), "gradient_checkpointing")
    dropped = "probabilities" if given.has("sdpa") else "none"
    why = "" if given.has("sdpa") else "only kohya's --sdpa drops attention probabilities"
    found.put("stage_c.attention_dropout", dropped, "sdpa", "xformers", why=why)
    _ignored(given, found)
    return found


def _networks(given: Given, found: Translation) -> None:
    for key, flag in (("network", "stage_c_checkpoint_path"), ("effnet", "effnet_checkpoint_path")):
        if given.value(flag) is None:
            found.refuse(flag, "is missing: kohya refuses that", f"stage_c.{key}")
        else:
            found.put(f"stage_c.{key}", given.value(flag), flag)
    text = given.value("text_model_checkpoint_path")
    why = "" if text else "the same CLIP bigG that kohya downloads"
    found.put("stage_c.text_encoder", text or _TEXT_MODEL, "text_model_checkpoint_path", why=why)
    if given.value("previewer_checkpoint_path") is not None:
        found.put("stage_c.previewer", given.value("previewer_checkpoint_path"), "previewer_checkpoint_path")


def _ignored(given: Given, found: Translation) -> None:
    """Offer, as comments, what flags say that the branch parses and ignores."""
    why = "kohya's stage C ignored it; uncomment to have it"
    if given.has("noise_offset"):
        found.put("stage_c.offset_noise", given.value("noise_offset"), "noise_offset", why=why, is_off=True)
    if given.has("min_timestep", "max_timestep"):
        low, high = given.value("min_timestep") or 0, given.value("max_timestep") or _MAX_STEP
        found.put(
            "stage_c.timestep_range", [low / _MAX_STEP, high / _MAX_STEP], "min_timestep", "max_timestep", why=why,
            is_off=True,
        )  # fmt: skip
    if given.has("min_snr_gamma"):
        found.put("stage_c.loss_weighting", "min_snr", "min_snr_gamma", why=why, is_off=True)
        found.put("stage_c.min_snr_gamma", given.value("min_snr_gamma"), "min_snr_gamma", why=why, is_off=True)


def _latents(given: Given, found: Translation) -> None:
    if given.has("cache_latents", "cache_latents_to_disk"):
        found.put(
            "latents.use", True, "cache_latents", "cache_latents_to_disk", why="run `training encode-latents` first"
        )
    if given.has("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"):
        found.put("latents.text", True, "cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk")


def _compile(given: Given, found: Translation) -> None:
    if not given.has("torch_compile"):
        return
    backend = given.value("dynamo_backend")
    if backend in ("inductor", "aot_eager"):
        found.put("compile", backend, "torch_compile", "dynamo_backend")
    else:
        found.refuse("dynamo_backend", f"{backend} is not here: inductor or aot_eager", "compile")


def _saving(given: Given, found: Translation) -> None:
    if given.value("save_every_n_steps"):
        found.put("save.every_steps", given.value("save_every_n_steps"), "save_every_n_steps")
    if (precision := given.value("save_precision")) is not None:
        found.put("save.export_dtype", _EXPORT.get(precision, precision), "save_precision")
    else:
        weights = "fp16" if given.has("full_fp16") else "bf16" if given.has("full_bf16") else "fp32"
        found.put("save.export_dtype", weights, "save_precision", why="without it kohya keeps the weights' format")
    for entry in ("title", "author", "description", "license", "tags"):
        if given.value(f"metadata_{entry}") is not None:
            found.put(f"save.modelspec.{entry}", given.value(f"metadata_{entry}"), f"metadata_{entry}")
    if given.has("no_metadata"):
        found.put("save.training_facts", False, "no_metadata")
    distance = given.value("save_last_n_steps_state") or given.value("save_last_n_steps")
    if distance:
        every = given.value("save_every_n_steps") or distance
        why = f"a distance of {distance} steps, saved every {every}"
        flags = ("save_last_n_steps", "save_last_n_steps_state")
        found.put("save.keep_states", max(1, -(-distance // every)), *flags, why=why)
    why = "kohya's is of one launch, this of the whole run; uncomment to have it"
    for key, flag in (("keep_exports", "save_last_n_epochs"), ("keep_chunks", "save_last_n_epochs_state")):
        if given.value(flag):
            found.put(f"save.{key}", given.value(flag), flag, why=why, is_off=True)


def _watching(given: Given, found: Translation) -> None:
    """Add [preview] and [trackers]."""
    by_epochs = given.has("sample_every_n_epochs")
    if given.value("sample_prompts") is not None:
        found.put("preview.file", given.value("sample_prompts"), "sample_prompts")
    elif given.has("sample_every_n_steps", "sample_every_n_epochs"):
        given.notes.append("a --sample_* interval without --sample_prompts is a TypeError in kohya; no previews here")
    steps = 0 if by_epochs else given.value("sample_every_n_steps") or 0
    found.put("preview.every_steps", steps, "sample_every_n_steps", "sample_every_n_epochs")
    found.put("preview.at_chunk_end", by_epochs, "sample_every_n_epochs")
    log_with = given.value("log_with") or ("tensorboard" if given.value("logging_dir") else None)
    found.put("trackers.tensorboard", log_with in ("tensorboard", "all"), "log_with", "logging_dir")
    if log_with in ("wandb", "all"):
        found.put("trackers.wandb", "online", "log_with")
        project = given.value("log_tracker_name") or "finetuning"
        found.put("trackers.wandb_project", project, "log_tracker_name")


def run_folder(given: Given) -> Path:
    """Return the run's folder: --output_dir without the number of a chunk at its end, as the run has all chunks."""
    if given.value("output_dir") is None:
        return Path("runs") / run_name(given)
    folder = Path(given.value("output_dir"))
    return folder.parent / "run" if folder.name.isdecimal() else folder
