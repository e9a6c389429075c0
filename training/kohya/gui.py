"""Read the JSON that the kohya_ss GUI saves: flags of the SD scripts under the GUI's names, and the GUI's own keys.

The GUI itself leaves out what is empty, off or, where a number of 0 means none, 0; so does this. No torch.
"""

import shlex
from collections.abc import Mapping
from typing import Any

from training.kohya.flag_table import Script, launcher_flags, trainer_flags
from training.kohya.given import Given, Unknown, read_arguments, read_launcher

# fmt: off
_OWN = frozenset({
    "model_list", "additional_parameters", "extra_accelerate_launch_args", "save_as_bool", "create_caption",
    "create_buckets", "full_path", "use_latent_files", "batch_size", "caption_metadata_filename",
    "latent_metadata_filename", "LoRA_type", "LyCORIS_preset", "sdxl", "training_preset", "noise_offset_type",
})
"""The GUI's own keys, which are no flags."""
_ANOTHER_NAME = {
    "image_folder": "train_data_dir", "sdxl_cache_text_encoder_outputs": "cache_text_encoder_outputs",
}
_ZERO_IS_NONE = frozenset({
    "max_train_steps", "max_train_epochs", "epoch", "seed", "save_every_n_steps", "save_every_n_epochs",
    "save_last_n_steps", "save_last_n_steps_state", "save_last_n_epochs", "save_last_n_epochs_state",
    "sample_every_n_steps", "sample_every_n_epochs", "min_snr_gamma", "noise_offset", "adaptive_noise_scale",
    "ip_noise_gamma", "multires_noise_iterations", "multires_noise_discount", "min_timestep", "max_timestep",
    "vae_batch_size", "v_pred_like_loss", "stop_text_encoder_training", "clip_skip", "main_process_port",
    "scale_weight_norms", "fused_optimizer_groups", "blocks_to_swap", "network_dropout", "lr_warmup",
    "lr_warmup_steps",
})
# fmt: on


def is_gui_config(values: Mapping[str, Any]) -> bool:
    """Tell a file that the GUI saved from other JSON."""
    return any(key in values for key in ("max_resolution", "model_list", "LoRA_type", "lr_warmup", "optimizer"))


def script_of_gui(values: Mapping[str, Any]) -> Script:
    """Return the script that the GUI's tab starts with these values."""
    is_xl = bool(values.get("sdxl"))
    if "LoRA_type" in values or "network_dim" in values:
        return "sdxl_network" if is_xl else "network"
    if is_xl:
        return "sdxl"
    return "fine_tune" if {"create_caption", "image_folder", "use_latent_files"} & values.keys() else "db"


def read_gui(values: Mapping[str, Any], given: Given, *, source: str) -> None:
    """Add what the GUI would put on the command line."""
    of_gui = {flag.gui or name: name for name, flag in trainer_flags().items()}
    flags: dict[str, Any] = {}
    for key, value in values.items():
        name = _ANOTHER_NAME.get(key) or of_gui.get(key) or key
        if key in _OWN or _is_none(key, value):
            continue
        if key == "xformers":
            _take_attention(value, flags)
        elif key == "lr_warmup":
            flags.setdefault("lr_warmup_steps", _warmup_steps(value, values, given))
        elif key in launcher_flags() and key not in trainer_flags():
            given.launcher[key] = launcher_flags()[key].read(key, value)
        elif name in trainer_flags():
            if trainer_flags()[name].kind == "switch" and not isinstance(value, bool):
                value = str(value).lower() not in ("0", "false", "no", "none")
            if trainer_flags()[name].kind == "words":
                value = str(value).replace('"', "")  # as the GUI does
            if value is not False:
                flags[name] = value
        else:
            given.unknown.append(Unknown(key, f"{value}", f"in {source}; of the GUI or of another kind of training"))
    flags["enable_bucket"] = bool(values.get("enable_bucket", True))  # the GUI's fine-tuning tab always says it
    given.take(flags, source=source, wins=False)
    read_arguments(shlex.split(str(values.get("additional_parameters") or "")), given)
    read_launcher(shlex.split(str(values.get("extra_accelerate_launch_args") or "")), given)


def _is_none(key: str, value: Any) -> bool:
    is_zero = str(value).strip() in ("0", "0.0")
    return value in ("", None) or value is False or (is_zero and key in _ZERO_IS_NONE)


def _take_attention(value: Any, flags: dict[str, Any]) -> None:
    name = "xformers" if value is True else str(value)
    if name in ("xformers", "sdpa"):
        flags[name] = True


def _warmup_steps(percent: Any, values: Mapping[str, Any], given: Given) -> int:
    """Return the GUI's lr_warmup, per cent of all steps, in steps."""
    steps = int(float(values.get("max_train_steps") or 0))
    if not steps:
        given.notes.append(
            f"lr_warmup {percent} % of a number of steps that the GUI finds out: set schedule.warmup_steps"
        )
    return round(float(percent) / 100 * steps)
