"""A commented run.toml for a file of concepts and a card: every value with the wiki's line, or what was measured."""

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sharding.config import parse_config
from training.commented_toml import Line, commented_toml
from training.config import RunConfig
from training.dreambooth.single_file.layout import Family
from training.dreambooth.suggest.counts import Counts, count_concepts
from training.dreambooth.suggest.length import Length, length_for, steps_between
from training.dreambooth.suggest.method import Way, buckets_of, choose_way, precision_of, tables_of, trained_of
from training.memory.sd_architecture import family_of_model

DEFAULT_MODEL = "models/Anything-V3.0-pruned-fp32.safetensors"
"""The wiki's example."""
NEGATIVE = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry, artist name"
)
SANITY_PROMPT = "masterpiece, best quality, 1girl"
SEED = 420420
PRIOR_OF_MANY, PRIOR_OF_ONE = 0.3, 0.75
_FULL_RATE, _STAGE_RATES, _LORA_RATES = 1e-6, (2e-6, 1e-6), (1e-4, 5e-5)
_RATIO = "Step Ratio of Text Encoder Training"
_STAGES = (("with-text", ["unet", "text_encoder"]), ("without-text", ["unet"]))


@dataclass(frozen=True)
class Suggestion:
    """text: the run.toml. notes: what to look at before it is run."""

    text: str
    notes: tuple[str, ...]


def suggest(concepts: Path, *, vram_gb: float, model: str | None = None) -> Suggestion:
    """Return a run.toml. concepts: a file of `[[concepts]]`; model: default the wiki's example.

    Raises ValueError when nothing fits the card, ConfigError, FileNotFoundError, WeightsError, BrokenDataError for
    what the files hold.
    """
    counts = count_concepts(concepts)
    named = model or DEFAULT_MODEL
    family, is_here = family_of_model(named)
    way = choose_way(family, named, side=_side(family, named), vram_gb=vram_gb)
    length = length_for(min(counts.shown.values()), is_staged=way.method == "staged")
    lines = list(_lines(counts, way, length, concepts=concepts, model=named))
    head = tuple(_head(counts, way, length, concepts=concepts, vram_gb=vram_gb))
    text = commented_toml(lines, head=head)
    parse_config(tomllib.loads(text), RunConfig, name="the suggestion")
    notes = [*counts.notes, *way.passed_over, *([counts.advice] if counts.advice else [])]
    if not is_here:
        notes.append(f"{named} is not here: its memory is taken for the published model's")
    return Suggestion(text, tuple(notes))


def _side(family: Family, model: str) -> int:
    if family == "sdxl":
        return 1024
    return 768 if family == "sd2" and "base" not in model.lower() else 512


def _head(counts: Counts, way: Way, length: Length, *, concepts: Path, vram_gb: float) -> Iterator[str]:
    title = {"full": "the whole UNet", "staged": "UNet and text encoder in two stages", "lora": "a LoRA"}[way.method]
    pictures = ", ".join(f"{name} {number}" for name, number in counts.by_concept.items())
    yield f"DreamBooth of {concepts.name} on a card of {vram_gb:g} GB: {title}. Suggested by `training suggest`."
    yield ""
    yield "    python -m training pack-concepts THIS_FILE"
    yield "    python -m training plan THIS_FILE --memory"
    yield "    python -m training run THIS_FILE --run-dir runs/NAME"
    yield ""
    yield f"Pictures: {pictures}; class images: {counts.class_images}."
    yield (
        f"An epoch shows {counts.showings}, {length.epochs} epochs {counts.showings * length.epochs:,} in "
        f"{-(-counts.showings // way.batch_size) * length.epochs:,} steps or a few more (buckets are not mixed)."
    )
    yield f"Memory, planned: {way.peak_bytes / 1e9:.1f} GB with micro-batch {way.micro_batch_size}; not tried on a GPU."
    for other in way.passed_over:
        yield f"Not chosen: {other}."
    if counts.advice:
        yield f"Look at this: {counts.advice}."


def _lines(counts: Counts, way: Way, length: Length, *, concepts: Path, model: str) -> Iterator[Line]:
    seeds = [one.sample.seed for one in counts.file.concepts if one.sample.seed >= 0]
    first_seed = "the concepts' own" if seeds else "wiki: 420420; any number"
    seed = seeds[0] if seeds else SEED
    yield Line("name", f"dreambooth-{_name(concepts)}")
    yield Line("seed", seed, first_seed)
    yield Line("data.workspace", f"workspace/{_name(concepts)}", "pack-concepts writes here")
    yield Line("data.chunks", ["concepts/*"])
    if way.method != "staged":
        yield Line("data.epochs", length.epochs, length.why)
    yield Line("batch.batch_size", way.batch_size, _batch_why(way))
    yield Line("batch.micro_batch_size", way.micro_batch_size, f"the most that fits: {way.peak_bytes / 1e9:.1f} GB")
    for number, (key, value) in enumerate(buckets_of(way.family, way.side).items()):
        why = "wiki: its table of valid resolutions" if way.side <= 512 else "sizes of about equal area"
        yield Line(f"buckets.{key}", value, why if number == 0 else "")
    yield Line("caption.shuffle", True, "not in the wiki; the extension does it")
    yield Line("caption.keep_first_tags", 1, "wiki: the name is the first tag")
    yield from _optimizer(way)
    yield Line("schedule.name", "constant")
    for key, chosen in precision_of(way.method, way.family).items():
        yield Line(f"precision.{key}", chosen, _precision_why(way) if key == "autocast" else "")
    every = steps_between(counts.showings, way.batch_size)
    yield Line("save.every_steps", every, "a state each ten epochs; wiki: 0, the model is written at a stage's end")
    yield Line("save.keep_states", 1, "wiki: writing often wears the SSD")
    yield Line("save.export_dtype", "fp16", "wiki: Half Model")
    yield Line("preview.every_steps", every, _preview_why(counts))
    if counts.file.held_out:
        yield Line("validation.chunk", "concepts/held-out", f"{counts.file.held_out} pictures of each concept")
    yield from _recipe(counts, way, concepts=concepts, model=model, seed=seed)
    yield from _lora(way)
    if way.method == "staged":
        yield from _stages(length)


def _optimizer(way: Way) -> Iterator[Line]:
    yield Line("optimizer.name", "adamw8bit", "wiki: Use 8bit Adam; needs bitsandbytes, adamw does not")
    if way.method == "lora":
        yield Line("optimizer.learning_rate", _LORA_RATES[0], "wiki: LoRA UNET Learning Rate")
        if way.family != "sdxl":
            yield Line("optimizer.text_encoder_learning_rate", _LORA_RATES[1], "wiki: LoRA Text Encoder Learning Rate")
    else:
        yield Line("optimizer.learning_rate", _FULL_RATE, "wiki: 0.000001 is a good place to begin")
    yield Line("optimizer.weight_decay", 0.01, "wiki: 0.01 - 0.005")
    if tables_of(way.method, way.family, "", side=way.side, checkpointing=True)["optimizer"].get("fused_backward"):
        why = "no gradients are kept: without it more memory is needed than the card has"
        yield Line("optimizer.fused_backward", True, why)
        yield Line("optimizer.max_grad_norm", 0.0, "as fused_backward needs it")


def _recipe(counts: Counts, way: Way, *, concepts: Path, model: str, seed: int) -> Iterator[Line]:
    yield Line("dreambooth.model", model, "wiki: no merged models; `plan` tells when it is one")
    yield Line("dreambooth.concepts", str(concepts))
    if way.method != "staged":
        parts = trained_of(way.method, way.family)
        yield Line("dreambooth.train", parts, f"wiki: {'rates for both' if len(parts) > 1 else _RATIO + ' 0'}")
    if way.family == "sd1":
        yield Line("dreambooth.clip_skip", 2, "anime models were trained so; 1 for others")
    if way.checkpointing:
        yield Line("dreambooth.gradient_checkpointing", True, "to fit, slower")
    yield Line("dreambooth.prior_weight", *_prior(counts))
    yield Line("dreambooth.sanity_prompt", SANITY_PROMPT, "wiki: Sanity Sample Prompt; nothing of the concepts in it")
    negatives = [one.sample.negative for one in counts.file.concepts if one.sample.negative]
    yield Line("dreambooth.sanity_negative", negatives[0] if negatives else NEGATIVE)
    yield Line("dreambooth.sanity_seed", seed)


def _lora(way: Way) -> Iterator[Line]:
    if way.method != "lora":
        return
    table = tables_of("lora", way.family, "", side=way.side, checkpointing=False)["lora"]
    yield Line("lora.targets", table["targets"], "as kohya's networks.lora")
    yield Line("lora.rank", table["rank"], "not in the wiki")
    yield Line("lora.alpha", table["alpha"])
    yield Line("lora.base_weights", table["base_weights"], "published weights lose nothing in it")
    yield Line("lora.formats", ["kohya"], "what A1111 and ComfyUI read")
    for key, value in table.get("text_encoder", {}).items():
        yield Line(f"lora.text_encoder.{key}", value)


def _stages(length: Length) -> Iterator[Line]:
    for number, (name, parts) in enumerate(_STAGES):
        key, ratio = f"dreambooth.stages.{number}", 1 - number
        yield Line(f"{key}.name", name)
        yield Line(f"{key}.epochs", length.stages[number], length.why)
        yield Line(f"{key}.learning_rate", _STAGE_RATES[number], f"wiki: stage {number + 1}")
        if ratio:
            yield Line(f"{key}.text_encoder_learning_rate", _STAGE_RATES[number], "the extension has one rate for both")
        yield Line(f"{key}.train", parts, f"wiki: {_RATIO} {ratio}")


def _prior(counts: Counts) -> tuple[float, str]:
    many = len(counts.by_concept) > 1
    weight, said = (
        (PRIOR_OF_MANY, "wiki: 0.25 - 0.35 (0.3)") if many else (PRIOR_OF_ONE, "wiki: .1 to .5 or default .75")
    )
    if counts.class_images:
        return weight, said
    more = "1 - 10" if many else "2 - 10"
    return weight, f"{said}; read when class_images.images_per_image is above 0 ({more})"


def _batch_why(way: Way) -> str:
    if way.batch_size != way.micro_batch_size:
        return f"wiki: 2 and 2 accumulated; here {way.micro_batch_size} and {way.batch_size // way.micro_batch_size}"
    return "wiki: 2; no accumulation" if way.micro_batch_size < 4 else "wiki: 2 and 2 accumulated; at once here"


def _precision_why(way: Way) -> str:
    return (
        "wiki: fp16"
        if precision_of(way.method, way.family)["autocast"] == "fp16"
        else "wiki: fp16, which fused_backward cannot have"
    )


def _preview_why(counts: Counts) -> str:
    drawn = sum(one.sample.images for one in counts.file.concepts if one.sample.prompt or one.sample.template)
    return f"wiki: as often as it is saved; {drawn} of the concepts' `sample`, and the sanity prompt"


def _name(concepts: Path) -> str:
    name = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in concepts.stem).strip("-")
    return name or "concepts"
