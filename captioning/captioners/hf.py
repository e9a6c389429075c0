"""Captioners of transformers: BLIP, GIT, Florence-2, and any other image-text-to-text model that is known by its id.

The model's own processor makes the input and `generate` the answer. Where the processor has a chat template, picture
and prompt are one turn of the user's; elsewhere the prompt goes in as it stands, so write what the model expects:
nothing for BLIP, `<DETAILED_CAPTION>` for Florence-2. No code from a model's repository is run.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from pydantic import Field, model_validator

from captioning.captioners.base import Cleaning, text_rows
from captioning.captioners.processors import preparer_of, read_processor
from captioning.model_files import ModelFilesSettings, locate
from captioning.plugin import Device, Identity, MissingExtraError, ModelError, Pixels, Row
from captioning.prompts import PLACEHOLDERS, Prompt
from captioning.torch_models import import_torch, quiet_transformers, torch_device
from sharding.schema import TEXTS

_PATTERNS = ("*.json", "model*.safetensors*", "pytorch_model*.bin*", "*.txt", "*.model", "*.jinja")
_VERSION = "captioner/1"


class Settings(ModelFilesSettings):
    """An image-text-to-text model, what it is asked, and how its answer is made and cleaned."""

    model: str
    """Folder of a transformers model that takes a picture and text and gives text, or a hub id."""
    prompt: str = ""
    """What is asked, with {tags}, {characters}, {series}, {artists} and {rating} where hints shall stand."""
    prompt_without_hints: str = ""
    """Asked of a picture of which nothing that `prompt` names is known; empty: `prompt` with gaps."""
    hints: str = ""
    """Where hints come from: `record`, or the name of a tagger in annotate.models; empty without placeholders."""
    hint_threshold: float = Field(0.35, ge=0, le=1)
    """Probability from which a tagger's tag is a hint."""
    hint_character_threshold: float = Field(0.5, ge=0, le=1)
    """The same for characters."""
    most_hints: int = Field(30, gt=0)
    """So many general tags at most."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the network."""
    max_pixels: int = Field(1 << 20, gt=0)
    """Larger pictures are resized to this area, bicubic. Not read for a model that squashes pictures to one size."""
    max_new_tokens: int = Field(256, gt=0)
    """Length of the answer."""
    min_new_tokens: int = Field(0, ge=0)
    """It does not end before so many."""
    num_beams: int = Field(1, gt=0)
    """Beams of the search; 1 is greedy."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Above 1: words that stand already become less likely."""
    sample: bool = False
    """Draw words by chance instead; each picture's chance comes from `seed` and its key, so it is drawn by itself."""
    temperature: float = Field(1.0, gt=0)
    """With `sample`: below 1 the likelier words become likelier."""
    top_p: float = Field(1.0, gt=0, le=1)
    """With `sample`: only the likeliest words that have this probability together."""
    seed: int = 0
    """With `sample`."""
    cleaning: Cleaning = "sentences/1"
    """Rules for what is stored: sentences/1 (repeats, prompt echo, "Here is …", fragments), or none."""

    @model_validator(mode="after")
    def _hints_fit_the_prompt(self) -> "Settings":
        has_places = any(f"{{{name}}}" in self.prompt for name in PLACEHOLDERS)
        if has_places != bool(self.hints):
            places = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
            raise ValueError(f"hints and prompt: give both hints and a prompt with one of {places}, or neither")
        if self.sample and self.num_beams > 1:
            raise ValueError("sample and num_beams: a sampled answer has one beam")
        return self


class HfCaptioner:
    """A loaded model with its processor."""

    batch_size = None

    def __init__(self, model: Any, processor: Any, settings: Settings, *, device: str) -> None:
        self.preparer = preparer_of(processor, settings.max_pixels)
        self._model = model
        self._processor = processor
        self._settings = settings
        self._device = device
        if getattr(processor, "tokenizer", None) is not None and not model.config.is_encoder_decoder:
            processor.tokenizer.padding_side = "left"  # answers begin where the longest prompt ends

    def describe(self, pictures: Sequence[Pixels], prompts: Sequence[str], keys: Sequence[str]) -> list[Row]:
        """Return schema.TEXTS rows; pictures: (H, W, 3) uint8 RGB each."""
        images = [Image.fromarray(pixels) for pixels in pictures]
        if self._settings.sample:
            texts = [
                self._generate([image], [prompt], seed=_seed(self._settings.seed, key))[0]
                for image, prompt, key in zip(images, prompts, keys, strict=True)
            ]
        else:
            texts = self._generate(images, prompts)
        return text_rows(texts, prompts, rules=self._settings.cleaning)

    def _generate(self, images: list[Image.Image], prompts: Sequence[str], *, seed: int = 0) -> list[str]:
        torch, settings = import_torch(), self._settings
        inputs = self._inputs(images, prompts).to(self._device)
        for name, value in inputs.items():
            if torch.is_tensor(value) and value.is_floating_point():
                inputs[name] = value.to(self._model.dtype)
        options: dict[str, Any] = {
            "max_new_tokens": settings.max_new_tokens,
            "min_new_tokens": settings.min_new_tokens,
            "num_beams": settings.num_beams,
            "repetition_penalty": settings.repetition_penalty,
            "do_sample": settings.sample,
        }
        if settings.sample:
            options |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
        with torch.inference_mode(), torch.random.fork_rng(enabled=settings.sample):
            if settings.sample:
                torch.manual_seed(seed)
            tokens = self._model.generate(**inputs, **options)
        asked = inputs.get("input_ids")
        if (
            asked is not None
            and tokens.shape[1] > asked.shape[1]
            and bool((tokens[:, : asked.shape[1]] == asked).all())
        ):
            tokens = tokens[:, asked.shape[1] :]
        texts: list[str] = self._processor.batch_decode(tokens, skip_special_tokens=True)
        return texts

    def _inputs(self, images: list[Image.Image], prompts: Sequence[str]) -> Any:
        texts = list(prompts)
        if getattr(self._processor, "chat_template", None):
            texts = [
                self._processor.apply_chat_template(
                    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}],
                    add_generation_prompt=True,
                    tokenize=False,
                )
                for prompt in prompts
            ]
        given: dict[str, Any] = {"text": texts, "padding": True} if any(texts) else {}
        # A list for each text: processors of models that take several pictures want to know whose each one is.
        pictures: list[Any] = [[image] for image in images] if given else images
        try:
            return self._processor(images=pictures, return_tensors="pt", **given)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise ModelError(
                f"{self._settings.model}: its processor does not take the prompt {prompts[0]!r} ({error}); write it as "
                "the model expects it, see the model's page"
            ) from error


def identify(settings: Settings) -> Identity:
    """Find the model's files. Raises ModelError."""
    _, revision = _find(settings)
    how = (
        *("dtype", "max_pixels", "max_new_tokens", "min_new_tokens", "num_beams", "repetition_penalty"),
        *("sample", "cleaning"),
    )
    chance = ("temperature", "top_p", "seed") if settings.sample else ()
    prompt = Prompt(
        settings.prompt,
        settings.prompt_without_hints,
        settings.hints,
        settings.hint_threshold,
        settings.hint_character_threshold,
        settings.most_hints,
    )
    return Identity(
        model=settings.model,
        revision=revision,
        preprocessing=f"{_VERSION} cleaning {settings.cleaning}",
        schema=TEXTS,
        licence=settings.licence,
        settings={name: getattr(settings, name) for name in (*how, *chance)} | {"prompt": prompt.identity},
        prompt=prompt,
    )


def load(settings: Settings, *, device: Device) -> HfCaptioner:
    """Load model and processor. Raises ModelError (MissingExtraError)."""
    torch = import_torch()
    target = torch_device(device)
    folder, _ = _find(settings)
    try:
        with quiet_transformers() as transformers:
            processor = read_processor(transformers, folder)
            model = transformers.AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True)
    except MissingExtraError:
        raise
    except ImportError as error:
        raise ModelError(f"{folder}: transformers needs a library for it that is not installed ({error})") from error
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{folder}: not an image-text-to-text model that transformers {transformers.__version__} knows without "
            f"code of the model's own ({str(error)[:300]})"
        ) from error
    return HfCaptioner(model.to(target, getattr(torch, settings.dtype)).eval(), processor, settings, device=target)


def _find(settings: Settings) -> tuple[Path, str]:
    return locate(settings.model, revision=settings.revision, patterns=_PATTERNS)


def _seed(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:8], "big") >> 1
