"""Which class images a concept wants: for each of its pictures so many, of the same size, with that picture's words.

Pure; no torch. A class image is wanted by all that makes it, so two wishes for the same are one file.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from sharding.files import digest_of
from training.config import Prompt
from training.config.concepts import ConceptConfig
from training.dreambooth.class_images.prompts import class_prompt

METHOD = 1
"""Counted up when the same wish is drawn otherwise: older files are then made again."""


@dataclass(frozen=True)
class ClassImage:
    """All that makes one, but for the model."""

    prompt: str
    negative: str
    width: int
    height: int
    """Pixels."""
    sampler: str
    guidance: float
    steps: int
    seed: int

    def as_prompt(self) -> Prompt:
        """Return it as what is drawn."""
        values = asdict(self)
        return Prompt(text=values.pop("prompt"), **values)


@dataclass(frozen=True)
class Instance:
    """A picture of a concept. key: its own for ever; width, height: its bucket's, in pixels."""

    key: str
    caption: str
    width: int
    height: int


def key(image: ClassImage, model_digest: str) -> str:
    """Return the SHA-256 of all that makes a class image. model_digest: see `model.digest`."""
    return digest_of({"method": METHOD, "model": model_digest, **asdict(image), "guidance": float(image.guidance)})


def class_images_of(concept: ConceptConfig, instances: Sequence[Instance], *, seed: int) -> list[ClassImage]:
    """Return class_images.images_per_image for each instance: first one for each, then the second ones, and so on.

    seed: the run's; an image's own is counted from it, the concept's name, the instance's key and the image's number,
    so that other pictures and concepts do not change it. Raises ValueError when a prompt made this way is the
    instance's own.
    """
    made = concept.class_images
    return [
        ClassImage(
            prompt=class_prompt(concept, instance.caption),
            negative=made.negative,
            width=instance.width,
            height=instance.height,
            sampler=made.sampler,
            guidance=made.guidance,
            steps=made.steps,
            seed=_seed(seed, concept.name, instance.key, number),
        )
        for number in range(made.images_per_image)
        for instance in instances
    ]


def _seed(*parts: int | str) -> int:
    """Return 32 bits, so that a web UI can be given the seed, too."""
    return int(digest_of(["class image", *parts])[:8], 16)
