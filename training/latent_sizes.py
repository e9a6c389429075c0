"""How large pictures are as latents: what `buckets.resolution` and a recipe's encoder make of them. No torch.

Everything that is configured is a picture's own size in pixels. Stable Diffusion makes one latent of 8 × 8 of them.
Stage C's encoder sees a picture scaled by encode_scale, and makes one latent of 32 × 32 of these pixels; decoders and
other programs take a latent for 42.67 × 42.67 pixels, whatever it was trained as: only with encode_scale 3/4 is a
picture drawn in the size that it had.
"""

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

from training.batch_plan import BatchPlan
from training.buckets import Bucket
from training.config import Prompt, RunConfig
from training.plan_checks import Finding

STAGE_C_PIXELS = 32
"""That stage C's image encoder makes one latent position of."""
DECODED_PIXELS = Fraction(128, 3)
"""That stage B and A draw of a latent of stage C, in every program that runs them."""
LARGER, SMALLER = 1.25, 0.8
"""Beyond these factors of the trained numbers of latents, a preview shows what is not trained."""


def latent_side(pixels: int, encode_scale: float) -> int:
    """Return stage C's latent side for a picture's: ceil(pixels × scale / 32); 1024 is 24 at 3/4 and 32 at 1."""
    return _latent_side(pixels, encode_scale, STAGE_C_PIXELS)


def _latent_side(pixels: int, encode_scale: float, stride: int) -> int:
    return math.ceil(round(pixels * encode_scale / stride, 6))


def latent_size(bucket: Bucket, config: RunConfig) -> str:
    """Return `24x24` for a stage C bucket of 768x768 pixels in the encoder."""
    stride = config.recipe.side_multiple
    return f"{bucket.width // stride}x{bucket.height // stride}"


def picture_size(bucket: Bucket, config: RunConfig) -> str:
    """Return `1024x1024`, the pictures' size, for a bucket of 768x768 pixels in the encoder and a scale of 3/4."""
    scale = config.recipe.encode_scale
    return f"{round(bucket.width / scale)}x{round(bucket.height / scale)}"


def decoded_size(config: RunConfig) -> tuple[int, int]:
    """Return the size in which other programs draw the latents of a picture of `buckets.resolution`."""
    recipe = config.recipe
    drawn = DECODED_PIXELS if config.recipe_name == "stage_c" else Fraction(recipe.side_multiple)
    width, height = (
        _latent_side(side, recipe.encode_scale, recipe.side_multiple) for side in config.buckets.resolution
    )
    return round(width * drawn), round(height * drawn)


def density_text(config: RunConfig) -> str:
    """Return what becomes of a picture of `buckets.resolution`, step by step."""
    resolution, scale = config.buckets.resolution, config.recipe.encode_scale
    encoded = [round(side * scale) for side in resolution]
    latent = [_latent_side(side, scale, config.recipe.side_multiple) for side in resolution]
    key = f" (stage_c.encode_scale {scale:g})" * (config.recipe_name == "stage_c")
    steps = [
        f"a picture of buckets.resolution {_times(resolution)}",
        f"{_times(encoded)} pixels in the encoder{key}",
        f"{_times(latent)} latents",
        f"{_times(decoded_size(config))} pixels when decoded",
    ]
    return " → ".join(steps)


def previews_text(prompts: Sequence[Prompt], config: RunConfig) -> str:
    """Return how many latents previews have; empty without previews."""
    sizes = dict.fromkeys(
        f"{_times((prompt.width, prompt.height))} as {_times(_latent(prompt, config))} latents" for prompt in prompts
    )
    return f"previews: {', '.join(sizes)}" if sizes else ""


def check_previews(plan: BatchPlan, prompts: Sequence[Prompt], *, config: RunConfig) -> tuple[Finding, ...]:
    """Return warnings of prompts that are drawn otherwise than pictures are trained."""
    trained = sorted(plan.images_per_bucket, key=lambda bucket: bucket.width * bucket.height)
    return tuple(
        Finding("warning", f"preview {number} ({prompt.text[:30]!r}) {problem}")
        for number, prompt in enumerate(prompts)
        for problem in (*_other_than_training(prompt, config), *_size_not_trained(prompt, trained, config))
    )


def _other_than_training(prompt: Prompt, config: RunConfig) -> Iterator[str]:
    settings = config.recipe
    if prompt.encode_scale not in (None, settings.encode_scale):
        trained = tuple(latent_side(side, settings.encode_scale) for side in (prompt.width, prompt.height))
        yield (
            f"has encode_scale {prompt.encode_scale:g}, training {settings.encode_scale:g}: it is drawn with "
            f"{_times(_latent(prompt, config))} latents, and trained with {_times(trained)}"
        )
    for name in ("max_tokens", "attention_mask"):
        own, trained_with = getattr(prompt, name), getattr(settings, name, None)
        if own is not None and own != trained_with:
            yield f"has {name} {str(own).lower()}, training {str(trained_with).lower()}"


def _size_not_trained(prompt: Prompt, trained: Sequence[Bucket], config: RunConfig) -> Iterator[str]:
    if not trained or prompt.encode_scale not in (None, config.recipe.encode_scale):
        return
    width, height = _latent(prompt, config)
    stride = config.recipe.side_multiple
    smallest, largest = (bucket.width * bucket.height / stride**2 for bucket in (trained[0], trained[-1]))
    if not smallest * SMALLER <= width * height <= largest * LARGER:
        yield (
            f"is drawn with {_times((width, height))} latents, but this chunk's buckets have "
            f"{latent_size(trained[0], config)} to {latent_size(trained[-1], config)}"
        )


def _latent(prompt: Prompt, config: RunConfig) -> tuple[int, int]:
    scale, stride = prompt.encode_scale or config.recipe.encode_scale, config.recipe.side_multiple
    return _latent_side(prompt.width, scale, stride), _latent_side(prompt.height, scale, stride)


def _times(sides: Sequence[int]) -> str:
    return "x".join(map(str, sides))
