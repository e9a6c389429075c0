"""Settings of DreamBooth: what is taught, from which folder, with which words. One `[[concepts]]` table each."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field, model_validator

from sharding.config import Config, Name
from training.config.dreambooth import SamplerName

FILEWORDS = "[filewords]"
"""Stands in a prompt for the caption beside the image."""


class ClassImagesConfig(Config):
    """Pictures of the concept's class, which hold the model to what it knew."""

    folder: str = ""
    """Pictures to take, never written to. What they lack of images_per_image is made, and kept in the workspace."""
    prompt: str = ""
    """What they show; `[filewords]` is the instance's caption."""
    token: str = ""
    """Word of the class; `prompt` may be left out when both tokens are given."""
    images_per_image: int = Field(0, ge=0)
    """How many there are for each picture of the concept; 0 trains without."""
    negative: str = ""
    """Negative prompt of those that are made."""
    guidance: float = Field(7.5, ge=0)
    """CFG scale of those that are made."""
    steps: int = Field(40, gt=0)
    """Sampling steps of those that are made."""
    sampler: SamplerName = "ddim"
    """Of those that are made: ddim, ddpm, euler, euler_a, dpm++_2m or dpm++_2m_karras."""


class SampleConfig(Config):
    """Pictures drawn of a concept while it is trained."""

    prompt: str = ""
    """`[filewords]` becomes one caption of the concept, always the same."""
    negative: str = ""
    """Negative prompt."""
    template: str = ""
    """A text file with a prompt on each line, in place of `prompt`."""
    images: int = Field(1, ge=0)
    """How many; 0 draws none."""
    seed: int = -1
    """Seed of the first one; -1 takes the run's."""
    guidance: float = Field(7.5, ge=0)
    """CFG scale."""
    steps: int = Field(20, gt=0)
    """Sampling steps."""


class ConceptConfig(Config):
    """One thing to teach: a character, a style, a part of the body."""

    name: Name
    """Shown in charts and reports; each concept has its own."""
    folder: Path
    """Its pictures, with captions of the same name and `caption_extension` beside them; folders below count, too."""
    prompt: str = FILEWORDS
    """What a picture is trained with."""
    token: str = ""
    """The concept's word, such as "sks dog": with a class token ("dog"), it takes that one's place in prompts and
    captions, unless it is there already."""
    caption_extension: str = ".txt"
    """Of the caption files."""
    repeats: int = Field(1, ge=1)
    """Times each picture is shown in an epoch."""
    loss_weight: float = Field(1.0, gt=0)
    """Of each picture's loss."""
    keep_first_tags: int | None = Field(None, ge=0)
    """Of a caption, this many stay in front when tags are shuffled; default: caption.keep_first_tags."""
    class_images: ClassImagesConfig = ClassImagesConfig()
    sample: SampleConfig = SampleConfig()

    @model_validator(mode="after")
    def _classes_differ(self) -> "ConceptConfig":
        made = self.class_images
        if made.images_per_image and made.prompt == self.prompt and made.token == self.token:
            raise ValueError(
                f"class_images.prompt {made.prompt!r} is the instance's own prompt: class images would pull the name "
                "back to what the model knew; give another class_images.prompt, or images_per_image = 0"
            )
        return self


class ConceptsFile(Config):
    """A file of concepts, as `python -m training import-concepts` writes it."""

    FREE: ClassVar = frozenset[str]()

    concepts: tuple[ConceptConfig, ...] = Field(min_length=1)
    balance: bool = False
    """Repeat the pictures of small concepts, so that an epoch shows each concept as often as whole repeats allow; the
    largest is shown once. `repeats` are not given then."""
    held_out: int = Field(0, ge=0)
    """Of each concept so many pictures, chosen by their content, are not trained but packed as `concepts/held-out`,
    for `validation.chunk`."""

    @model_validator(mode="after")
    def _repeats_are_read(self) -> "ConceptsFile":
        if self.balance and (given := [concept.name for concept in self.concepts if concept.repeats > 1]):
            raise ValueError(f"balance chooses the repeats; leave out those of {given[0]!r}, or balance")
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> "ConceptsFile":
        names = [concept.name for concept in self.concepts]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two concepts are named {doubled[0]!r}")
        return self
