"""From kohya's flags to [data], [batch], [buckets], [caption]: which pictures, how large, with which words."""

from training.kohya.given import Given
from training.kohya.setting import Translation

_HUE, _GAMMA = 8 / 180, 0.05
"""Of kohya's --color_aug: 8 of the 180 steps of cv2's hue, gamma of 0.95 to 1.05."""


def data_settings(given: Given, found: Translation, *, workspace: str, chunks: str) -> None:
    """Add [data]."""
    found.put("data.workspace", workspace, "train_data_dir", "in_json", why="made by scripts.build_chunks")
    found.put("data.chunks", [chunks], "train_data_dir", "in_json")
    epochs, repeats = given.value("max_train_epochs"), given.value("dataset_repeats")
    why = ""
    if epochs is None:
        steps = given.value("max_train_steps")
        why = f"kohya: {steps:,} steps, however many pictures there are; choose the passes over each chunk"
    elif repeats > 1:
        why = f"{epochs} epochs of {repeats} showings each"
    found.put("data.epochs", (epochs or 1) * repeats, "max_train_epochs", "dataset_repeats", "max_train_steps", why=why)
    found.put("data.workers", given.value("max_data_loader_n_workers"), "max_data_loader_n_workers")
    if given.has("flip_aug"):
        found.put("data.horizontal_flip", True, "flip_aug")
    if given.has("random_crop"):
        found.put("data.crop", "random", "random_crop")
    if given.has("color_aug"):
        found.put("data.colour_jitter.hue", round(_HUE, 3), "color_aug")
        found.put("data.colour_jitter.brightness", _GAMMA, "color_aug", why="for a gamma of 0.95 to 1.05")


def batch_settings(given: Given, found: Translation) -> None:
    """Add [batch]: a step holds what kohya's step holds, over all processes."""
    images, accumulation = given.value("train_batch_size"), given.value("gradient_accumulation_steps")
    processes = given.launcher.get("num_processes", 1)
    found.put("batch.micro_batch_size", images, "train_batch_size")
    if given.has("fused_backward_pass"):
        accumulation = 1
    why = f"{images} images × {accumulation} × {processes} process{'es' * (processes > 1)}"
    found.put(
        "batch.batch_size", images * accumulation * processes,
        "train_batch_size", "gradient_accumulation_steps", "num_processes", why=why,
    )  # fmt: skip


def bucket_settings(given: Given, found: Translation) -> None:
    """Add [buckets]."""
    resolution = _resolution(given, found)
    step = given.value("bucket_reso_steps")
    if not given.has("enable_bucket"):
        found.put("buckets.family", "ratios", "enable_bucket", why="without --enable_bucket one size for all")
        if resolution is not None:
            ratio = resolution[0] / resolution[1]
            why = "" if ratio == 1 else "its inverse, too: kohya cuts upright pictures to the same lying size"
            found.put("buckets.ratios", [ratio], "enable_bucket", why=why)
        found.put("buckets.step", 32, "enable_bucket", why="of the encoder; no buckets, no --bucket_reso_steps")
    elif given.has("bucket_no_upscale"):
        found.put("buckets.family", "no_upscale", "enable_bucket", "bucket_no_upscale")
        found.put("buckets.step", step, "bucket_reso_steps")
        for key, flag in (("min_side", "min_bucket_reso"), ("max_side", "max_bucket_reso")):
            if flag in given.flags:
                why = "kohya ignores it with --bucket_no_upscale; uncomment to have it"
                found.put(f"buckets.{key}", given.value(flag), flag, why=why, is_off=True)
    else:
        found.put("buckets.family", "area", "enable_bucket", "bucket_no_upscale", why="small pictures are enlarged")
        found.put("buckets.step", step, "bucket_reso_steps")
        found.put("buckets.min_side", given.value("min_bucket_reso"), "min_bucket_reso")
        found.put("buckets.max_side", given.value("max_bucket_reso"), "max_bucket_reso")


def _resolution(given: Given, found: Translation) -> tuple[int, int] | None:
    written = given.value("resolution")
    if written is None:
        found.refuse("resolution", "is missing: kohya refuses that", "buckets.resolution")
        return None
    sides = [side.strip() for side in written.split(",")]
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        found.refuse("resolution", f"{written!r} is neither SIDE nor WIDTH,HEIGHT", "buckets.resolution")
        return None
    width, height = int(sides[0]), int(sides[-1])
    found.put("buckets.resolution", [width, height], "resolution")
    return width, height


def caption_settings(given: Given, found: Translation) -> None:
    """Add [caption]: as kohya's process_caption does it."""
    found.put("caption.compat", "kohya", why="as its process_caption: kept tags are counted, groups not looked at")
    found.put("caption.separator", given.value("caption_separator"), "caption_separator")
    found.put("caption.shuffle", given.has("shuffle_caption"), "shuffle_caption")
    for key, flag, unset in (
        ("keep_first_tags", "keep_tokens", 0),
        ("keep_separator", "keep_tokens_separator", ""),
        ("secondary_separator", "secondary_separator", None),
        ("prefix", "caption_prefix", None),
        ("suffix", "caption_suffix", None),
        ("caption_dropout_fraction", "caption_dropout_rate", 0),
        ("tag_dropout_fraction", "caption_tag_dropout_rate", 0),
        ("caption_dropout_every_epochs", "caption_dropout_every_n_epochs", 0),
        ("token_warmup_min", "token_warmup_min", 1),
    ):
        if flag in given.flags or given.value(flag) != unset:
            found.put(f"caption.{key}", given.value(flag), flag)
    if given.has("enable_wildcard"):
        found.put("caption.wildcards", True, "enable_wildcard")
        found.put("caption.lines", "random", "enable_wildcard")
    warmup = given.value("token_warmup_step")
    if 0 < warmup < 1:
        found.put("caption.token_warmup_fraction", warmup, "token_warmup_step", why="of schedule.total_steps")
    elif warmup or "token_warmup_step" in given.flags:
        found.put("caption.token_warmup_steps", int(warmup), "token_warmup_step")
