"""From kohya's flags to [optimizer], [schedule], [precision] and [parallel]: how weights change."""

import ast
from collections.abc import Mapping
from typing import Any

from training.kohya.flag_table import OF_THE_BRANCH
from training.kohya.given import Given
from training.kohya.setting import Translation
from training.schedules import NEEDS_HORIZON

_OPTIMIZERS = {
    "adamw": "adamw", "adamw8bit": "adamw8bit", "pagedadamw": "adamw", "pagedadamw32bit": "adamw",
    "pagedadamw8bit": "adamw8bit", "adafactor": "adafactor", "lion": "lion", "lion8bit": "lion8bit",
    "pagedlion8bit": "lion8bit", "prodigy": "prodigy", "adamwschedulefree": "schedule_free",
    "schedulefree.adamwschedulefree": "schedule_free",
}  # fmt: skip
_ADAFACTOR_OFF = ("scale_parameter", "relative_step", "warmup_init")
_ARGUMENTS = {
    "betas": "betas", "eps": "eps", "weight_decay": "weight_decay", "clip_threshold": "adafactor_clip_threshold",
    "d_coef": "prodigy_d_coef", "use_bias_correction": "prodigy_bias_correction",
    "safeguard_warmup": "prodigy_safeguard_warmup",
}  # fmt: skip
_WEIGHT_DECAY = {"adamw": 0.01, "adamw8bit": 0.01}
"""What torch's and bitsandbytes' AdamW decay by when nothing is said."""
_SCHEDULES = (*NEEDS_HORIZON, "constant", "constant_with_warmup", "piecewise_constant")
_OFFLOADED = {("cpu", None): "optimizer", ("cpu", "cpu"): "optimizer_and_weights"}


def optimizer_settings(given: Given, found: Translation) -> None:
    """Add [optimizer]."""
    name = _optimizer_name(given, found)
    if name is not None:
        found.put("optimizer.name", name, "optimizer_type", "use_8bit_adam", "use_lion_optimizer")
    _rates(given, found)
    if name is not None:
        _arguments(name, given, found)
    found.put("optimizer.max_grad_norm", given.value("max_grad_norm"), "max_grad_norm")
    if given.has("fused_backward_pass"):
        found.put("optimizer.fused_backward", True, "fused_backward_pass")


def _optimizer_name(given: Given, found: Translation) -> str | None:
    written = given.value("optimizer_type") or ""
    if not written:
        written = "AdamW8bit" if given.has("use_8bit_adam") else "Lion" if given.has("use_lion_optimizer") else "AdamW"
    name = _OPTIMIZERS.get(written.lower())
    if name is None:
        advice = "Prodigy is its successor" if written.lower().startswith("dadapt") else "choose another"
        text = f"{written} is not here: {advice}, with --set optimizer.name=… (training/README.md lists them)"
        found.refuse("optimizer_type", text, "optimizer.name")
    return name


def _rates(given: Given, found: Translation) -> None:
    if given.has("unet_lr") or given.script in ("network", "sdxl_network", "stage_c_network"):
        flags: tuple[str, ...] = ("unet_lr", "learning_rate")
        rate, text = given.value("unet_lr") or given.value("learning_rate"), given.value("text_encoder_lr")
        text_rate, text_flag = (float(text[0]) if text else None), "text_encoder_lr"
    else:
        flags, rate = ("learning_rate",), given.value("learning_rate")
        text_flag = "learning_rate_te" if given.has("learning_rate_te") else "learning_rate_te1"
        text_rate = given.value(text_flag)
    if rate == 0 and given.has("train_text_encoder") and text_rate and given.script in OF_THE_BRANCH:
        found.put("optimizer.freeze", ["network.*"], *flags, why="a rate of 0: only the text encoder is trained")
        rate = text_rate
    elif not rate:
        found.refuse(flags[0], "is 0: nothing would be trained", "optimizer.learning_rate")
        return
    found.put("optimizer.learning_rate", rate, *flags)
    if text_rate:
        found.put("optimizer.text_encoder_learning_rate", text_rate, text_flag)


def _arguments(name: str, given: Given, found: Translation) -> None:
    arguments = _read_arguments("optimizer_args", given, found)
    decay = arguments.get("weight_decay", _WEIGHT_DECAY.get(name, 0.0))
    if name == "adafactor":
        _adafactor(arguments, found)
    for argument, value in arguments.items():
        if name == "adafactor" and argument == "eps":
            value = value[0] if isinstance(value, tuple) else value
            found.put("optimizer.adafactor_eps", value, "optimizer_args")
        elif argument in _ARGUMENTS:
            found.put(f"optimizer.{_ARGUMENTS[argument]}", value, "optimizer_args")
        elif not (name == "prodigy" and (argument, value) == ("decouple", True)):
            found.refuse(
                "optimizer_args", f"{argument}={value!r} is not here", f"optimizer.{argument}", "optimizer.name"
            )
    if decay:
        if "weight_decay" not in arguments:
            why = "what AdamW decays by when nothing is said"
            found.put("optimizer.weight_decay", decay, "optimizer_type", why=why)
        why = "kohya's decay takes biases and norms, too"
        found.put("optimizer.decay_vectors", True, "optimizer_type", why=why)


def _adafactor(arguments: dict[str, Any], found: Translation) -> None:
    """Take out what this Adafactor has switched off for good; refuse it switched on."""
    found.put(
        "optimizer.adafactor_clip_threshold", arguments.pop("clip_threshold", 1.0), "optimizer_args", "optimizer_type"
    )
    on = {"scale_parameter": True, "relative_step": True, "warmup_init": False}
    for argument in _ADAFACTOR_OFF:
        if arguments.pop(argument, on[argument]):
            text = f"Adafactor with {argument}=True is not here: its rate would not be the schedule's"
            found.refuse("optimizer_args", f"{text}; say {argument}=False", "optimizer.name")
    for argument, only in (("decay_rate", -0.8), ("beta1", None)):
        if (value := arguments.pop(argument, only)) != only:
            found.refuse("optimizer_args", f"Adafactor with {argument}={value!r} is not here", "optimizer.name")


def _read_arguments(flag: str, given: Given, found: Translation) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for word in given.value(flag) or []:
        name, equals, text = word.partition("=")
        try:
            values[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[name] = text
        if not equals:
            found.refuse(flag, f"{word!r} is not NAME=VALUE")
    return values


def schedule_settings(given: Given, found: Translation) -> None:
    """Add [schedule]: a function of the run's global step, whatever the number of processes and launches."""
    name, horizon = str(given.value("lr_scheduler")), given.value("max_train_steps")
    if given.value("lr_scheduler_type") or name not in _SCHEDULES:
        shown = given.value("lr_scheduler_type") or name
        text = f"{shown} is not here; choose one of {', '.join(sorted(_SCHEDULES))} with --set schedule.name=…"
        found.refuse("lr_scheduler_type" if given.value("lr_scheduler_type") else "lr_scheduler", text, "schedule.name")
        return
    found.put("schedule.name", name, "lr_scheduler")
    if name not in ("constant", "piecewise_constant"):
        _warmup(given, found, horizon)
    knows_steps = "max_train_steps" in given.flags and "max_train_epochs" not in given.flags
    if name in NEEDS_HORIZON and knows_steps:
        found.put(
            "schedule.total_steps", horizon, "max_train_steps", why="kohya's is of one launch, this of the whole run"
        )
    elif name in NEEDS_HORIZON:
        text = f'{name} needs the steps of the whole run: --set schedule.total_steps=N; "training plan" counts them'
        found.refuse("lr_scheduler", text, "schedule.total_steps", "schedule.name")
    if name == "cosine_with_restarts":
        found.put("schedule.restarts", given.value("lr_scheduler_num_cycles"), "lr_scheduler_num_cycles")
    if name == "polynomial":
        found.put("schedule.power", given.value("lr_scheduler_power"), "lr_scheduler_power")
    if name in NEEDS_HORIZON and given.value("lr_scheduler_min_lr_ratio"):
        found.put("schedule.end_fraction", given.value("lr_scheduler_min_lr_ratio"), "lr_scheduler_min_lr_ratio")
    for argument, value in _read_arguments("lr_scheduler_args", given, found).items():
        if name == "piecewise_constant" and argument == "step_rules":
            found.put("schedule.rules", str(value), "lr_scheduler_args")
        else:
            found.refuse("lr_scheduler_args", f"{argument}={value!r} is not here", "schedule.name")


def _warmup(given: Given, found: Translation, horizon: int) -> None:
    warmup, processes = given.value("lr_warmup_steps"), given.launcher.get("num_processes", 1)
    if 0 < warmup < 1:
        warmup = round(warmup * horizon)
    why = (
        f"on {processes} processes kohya's was over after {warmup / processes:g} steps"
        if processes > 1 and warmup
        else ""
    )
    found.put("schedule.warmup_steps", int(warmup), "lr_warmup_steps", why=why)


def precision_settings(given: Given, found: Translation) -> None:
    """Add [precision]."""
    autocast = given.value("mixed_precision")
    found.put("precision.autocast", autocast, "mixed_precision")
    weights = "fp16" if given.has("full_fp16") else "bf16" if given.has("full_bf16") else "fp32"
    why = "safer: fp32" if weights == "fp16" else ""
    found.put("precision.weights", weights, "full_fp16", "full_bf16", why=why)
    if weights != "fp32" and autocast != weights:
        found.refuse(f"full_{weights}", f"needs --mixed_precision {weights}, as in kohya", "precision.weights")
    if weights == "bf16":
        why = "kohya's; uncomment to lose what it lost"
        found.put("precision.rounding", "nearest", "full_bf16", why=why, is_off=True)
    if (threads := given.launcher.get("num_cpu_threads_per_process")) is not None:
        found.put("precision.num_threads", threads, "num_cpu_threads_per_process")


def parallel_settings(given: Given, found: Translation) -> None:
    """Add [parallel] where a command asks for something else than a whole network on each process."""
    launcher: Mapping[str, Any] = given.launcher
    if given.has("deepspeed") or launcher.get("use_deepspeed"):
        stage = given.value("zero_stage")
        strategy = f"zero{stage}" if stage else "ddp"
        found.put("parallel.strategy", strategy, "deepspeed", "zero_stage", "use_deepspeed")
        devices = (given.value("offload_optimizer_device"), given.value("offload_param_device"))
        if devices in _OFFLOADED:
            flags = ("offload_optimizer_device", "offload_param_device")
            found.put("parallel.offload", _OFFLOADED[devices], *flags)
        elif any(devices):
            text = f"{devices[0]} for the optimizer, {devices[1]} for weights: not here"
            found.refuse("offload_optimizer_device", text, "parallel.offload")
    elif launcher.get("use_fsdp"):
        found.put("parallel.strategy", "fsdp2", "use_fsdp")
