"""From the flags of kohya's Stable Diffusion scripts to the recipe dreambooth: what is trained, and with which loss."""

from training.kohya.given import Given
from training.kohya.lora_settings import lora_settings
from training.kohya.run_settings import shared_settings
from training.kohya.setting import Translation

CONCEPTS = "concepts.toml"
_MAX_STEP = 1000
_WITH_LORA = ("network", "sdxl_network")
_OF_SDXL = ("sdxl", "sdxl_network")
_NOT_HERE = {
    "weighted_captions": "caption weights such as (word:1.2) are not here",
    "no_token_padding": "captions without padding are not here",
    "noise_offset_random_strength": "an offset of random strength is not here",
    "adaptive_noise_scale": "an offset by the latent's mean is not here",
    "ip_noise_gamma_random_strength": "a perturbation of random strength is not here",
    "scale_v_pred_loss_like_noise_pred": "this weighting of v-prediction is not here; min_snr and debiased are",
    "v_pred_like_loss": "this weighting is not here; min_snr and debiased are",
}
_SETTLED_BY = {
    "noise_offset_random_strength": "dreambooth.offset_noise", "adaptive_noise_scale": "dreambooth.offset_noise",
    "ip_noise_gamma_random_strength": "dreambooth.input_perturbation", "weighted_captions": "dreambooth.max_tokens",
    "no_token_padding": "dreambooth.max_tokens",
}  # fmt: skip


def packs_concepts(given: Given) -> bool:
    """Tell whether the command's pictures are folders of concepts, not pictures with a metadata file."""
    return not given.value("in_json")


def dreambooth_settings(given: Given, *, workspace: str, chunks: str) -> Translation:
    """Return all settings for a command of train_db, fine_tune, train_network, sdxl_train or sdxl_train_network."""
    found = shared_settings(given, workspace=workspace, chunks=chunks)
    if packs_concepts(given):
        for key, value, why in (
            ("data.workspace", workspace, "written by pack-concepts"),
            ("data.chunks", ["concepts/*"], ""),
        ):
            found.take_out(key)
            found.put(key, value, "train_data_dir", "dataset_config", why=why)
        found.put("dreambooth.concepts", CONCEPTS, "train_data_dir", "dataset_config", why="by import-concepts")
        why = "kohya's loss is this one, too: (1/N) Σ w L"
        found.put("dreambooth.prior_weight", given.value("prior_loss_weight"), "prior_loss_weight", why=why)
        if given.value("reg_data_dir"):
            text = f'--reg_data_dir: write class_images = {{ folder = "{given.value("reg_data_dir")}", prompt = …, '
            given.notes.append(text + f"images_per_image = 1 }} into the concepts of {CONCEPTS} that it is for")
    _model(given, found)
    _parts(given, found)
    _loss(given, found)
    for flag, text in _NOT_HERE.items():
        if given.has(flag):
            found.refuse(flag, text, _SETTLED_BY.get(flag, "dreambooth.loss_weighting"))
    return found


def _model(given: Given, found: Translation) -> None:
    if given.value("pretrained_model_name_or_path") is None:
        found.refuse("pretrained_model_name_or_path", "is missing: kohya refuses that", "dreambooth.model")
    else:
        found.put("dreambooth.model", given.value("pretrained_model_name_or_path"), "pretrained_model_name_or_path")
    if given.value("vae"):
        found.put("dreambooth.vae", given.value("vae"), "vae")
    half = given.value("mixed_precision")
    dtype = "fp32" if given.has("no_half_vae") or half == "no" else half
    found.put("dreambooth.vae_dtype", dtype, "no_half_vae", "mixed_precision")
    found.put("dreambooth.max_tokens", given.value("max_token_length") or 75, "max_token_length")
    if given.has("clip_skip") and given.script not in _OF_SDXL:
        found.put("dreambooth.clip_skip", given.value("clip_skip"), "clip_skip")
    predicts_v = given.has("v_parameterization")
    why = "" if predicts_v else "kohya asks no model what it predicts"
    found.put(
        "dreambooth.prediction", "v_prediction" if predicts_v else "epsilon", "v_parameterization", why=why,
    )  # fmt: skip
    found.put("dreambooth.zero_terminal_snr", given.has("zero_terminal_snr"), "zero_terminal_snr")
    if given.has("zero_terminal_snr") and not predicts_v:
        text = "needs --v_parameterization: pure noise says nothing about the noise in it"
        found.refuse("zero_terminal_snr", text, "dreambooth.zero_terminal_snr", "dreambooth.prediction")
    why = "torch's own needs as little memory" if given.has("xformers", "mem_eff_attn") else ""
    found.put("dreambooth.attention", "sdpa", "xformers", "mem_eff_attn", "sdpa", why=why)
    found.put("dreambooth.gradient_checkpointing", given.has("gradient_checkpointing"), "gradient_checkpointing")


def _parts(given: Given, found: Translation) -> None:
    """Add what is trained, and the rates of SDXL's second text encoder."""
    texts = ["text_encoder", "text_encoder_2"] if given.script in _OF_SDXL else ["text_encoder"]
    flags: tuple[str, ...]
    if given.script in _WITH_LORA:
        lora_settings(given, found)
        flags = ("network_train_unet_only", "network_train_text_encoder_only")
        parts = ["unet"] if given.has(flags[0]) else texts if given.has(flags[1]) else ["unet", *texts]
    elif given.script == "db":
        flags = ("stop_text_encoder_training",)
        stop = given.value("stop_text_encoder_training")
        parts = ["unet"] if stop is not None and stop <= 0 else ["unet", *texts]
        if stop is not None and stop > 0:
            _stop(given, found, stop)
    else:
        flags = ("train_text_encoder", "learning_rate_te1", "learning_rate_te2")
        frozen = [
            name for name, flag in zip(texts, flags[1:], strict=False)
            if given.script == "sdxl" and given.value(flag) == 0
        ]  # fmt: skip
        parts = ["unet", *(name for name in texts if given.has(flags[0]) and name not in frozen)]
    found.put("dreambooth.train", parts, *flags)
    if "text_encoder_2" in parts:
        if (rates := given.value("text_encoder_lr") or []) and given.script == "sdxl_network":
            found.put("dreambooth.text_encoder_2_learning_rate", float(rates[-1]), "text_encoder_lr")
        elif given.script == "sdxl" and given.value("learning_rate_te2"):
            found.put("dreambooth.text_encoder_2_learning_rate", given.value("learning_rate_te2"), "learning_rate_te2")


def _stop(given: Given, found: Translation, stop: int) -> None:
    """Add the share of the epochs that so many steps are."""
    if given.has("max_train_epochs"):
        text = f"{stop} steps are a share of the epochs here: --set dreambooth.text_encoder_ratio=…"
        found.refuse("stop_text_encoder_training", text, "dreambooth.text_encoder_ratio")
        return
    ratio = min(1.0, round(stop / given.value("max_train_steps"), 3))
    why = f"{stop:,} of {given.value('max_train_steps'):,} steps; here whole epochs"
    text = "whole epochs are counted here: --set data.epochs=…, in place of --max_train_steps"
    found.refuse("stop_text_encoder_training", text, "data.epochs")
    found.put("dreambooth.text_encoder_ratio", ratio, "stop_text_encoder_training", "max_train_steps", why=why)


def _loss(given: Given, found: Translation) -> None:
    loss = given.value("loss_type")
    if loss not in ("l2", "huber", "smooth_l1"):
        found.refuse("loss_type", f"{loss} is not here: l2, huber, smooth_l1", "dreambooth.loss")
    elif loss != "l2":
        found.put("dreambooth.loss", loss, "loss_type")
        found.put("dreambooth.huber_c", given.value("huber_c"), "huber_c")
        found.put("dreambooth.huber_schedule", given.value("huber_schedule"), "huber_schedule")
    if given.has("min_snr_gamma"):
        found.put("dreambooth.loss_weighting", "min_snr", "min_snr_gamma")
        found.put("dreambooth.loss_gamma", given.value("min_snr_gamma"), "min_snr_gamma")
        if given.has("debiased_estimation_loss"):
            text = "is multiplied with --min_snr_gamma's weight; one of them is here"
            found.refuse("debiased_estimation_loss", text, "dreambooth.loss_weighting")
    elif given.has("debiased_estimation_loss"):
        found.put("dreambooth.loss_weighting", "debiased", "debiased_estimation_loss")
    for key, flag in (
        ("offset_noise", "noise_offset"),
        ("multires_iterations", "multires_noise_iterations"),
        ("input_perturbation", "ip_noise_gamma"),
    ):
        if given.value(flag):
            found.put(f"dreambooth.{key}", given.value(flag), flag)
    if given.value("multires_noise_iterations"):
        found.put("dreambooth.multires_discount", given.value("multires_noise_discount"), "multires_noise_discount")
    if given.has("min_timestep", "max_timestep"):
        low, high = given.value("min_timestep") or 0, given.value("max_timestep") or _MAX_STEP
        found.put("dreambooth.timestep_range", [low / _MAX_STEP, high / _MAX_STEP], "min_timestep", "max_timestep")
