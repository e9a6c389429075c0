"""The captions that a concept's pictures are packed with. Pure; no torch.

Prompts and tokens are `class_images.prompts`; here come captions of several lines, empty ones, and the mark that keeps
a concept's first tags in front when the run shuffles.
"""

from collections.abc import Callable

from sharding.config import ConfigError
from training.caption_settings import CaptionSettings
from training.config import RunConfig
from training.config.captions import CaptionConfig
from training.config.concepts import ConceptConfig
from training.dreambooth.class_images.prompts import class_prompt, instance_prompt

_A_LONG_RUN = 1_000_000


def instance_text(concept: ConceptConfig, caption: str, settings: CaptionConfig) -> str:
    """Return what the index says of a picture of the concept. Raises ConfigError when its first tags cannot be kept."""
    return _text(lambda words: instance_prompt(concept, words), caption, concept, settings)


def class_text(concept: ConceptConfig, caption: str, settings: CaptionConfig) -> str:
    """Return what it says of a class image. Raises ValueError as `class_prompt` does."""
    return _text(lambda words: class_prompt(concept, words), caption, concept, settings)


def class_text_of(concept: ConceptConfig, prompt: str, settings: CaptionConfig) -> str:
    """Return what it says of a class image that was drawn with a prompt."""
    return kept_in_front(_tidy(prompt), concept, settings)


def first_line(caption: str, settings: CaptionConfig) -> str:
    """Return the words that a class image for this caption is drawn with."""
    return caption if settings.lines == "all" else next(iter(_lines(caption)), "")


def has_class(concept: ConceptConfig) -> bool:
    """Tell whether it is said what the concept is one of."""
    return bool(concept.class_images.prompt or (concept.token and concept.class_images.token))


def stands_for_class(concept: ConceptConfig, config: RunConfig) -> bool:
    """Tell whether a concept's own pictures are shown with the class's words, too: a prior without class images."""
    is_base = config.of_dreambooth.prior_target == "base_model"
    return is_base and has_class(concept) and not concept.class_images.images_per_image


def kept_in_front(text: str, concept: ConceptConfig, settings: CaptionConfig) -> str:
    """Return a caption with the mark `caption.keep_separator` behind the concept's own number of first tags.

    Without that number, and where the run leaves captions in their order, the caption stays as it is; so does one that
    has the mark already, or a single tag.
    """
    keep = concept.keep_first_tags
    if keep is None or keep == settings.keep_first_tags or not _is_taken_apart(settings):
        return text
    mark = settings.keep_separator
    if not mark:
        raise ConfigError(
            f"concept {concept.name!r}: keep_first_tags {keep} is not the run's {settings.keep_first_tags}: where they "
            "end is marked in the captions, and the run has to know the mark: --set caption.keep_separator='|||'"
        )
    separator = settings.separator.strip()
    tags = text.split(separator)
    if mark in text or len(tags) < 2:
        return text
    return separator.join(tags[:keep]) + mark + separator.join(tags[keep:]).lstrip()


def _text(prompt: Callable[[str], str], caption: str, concept: ConceptConfig, settings: CaptionConfig) -> str:
    lines = [caption] if settings.lines == "all" else _lines(caption) or [""]
    return "\n".join(kept_in_front(prompt(line) if line else _tidy(prompt(line)), concept, settings) for line in lines)


def _lines(caption: str) -> list[str]:
    return [line.strip() for line in caption.splitlines() if line.strip()]


def _tidy(words: str) -> str:
    """Take away the comma that an empty caption leaves."""
    return words.strip(" ,")


def _is_taken_apart(settings: CaptionConfig) -> bool:
    return CaptionSettings(**settings.model_dump(), total_steps=_A_LONG_RUN).takes_apart
