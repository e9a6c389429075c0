"""What the index of a stage's chunk says: a row for each picture and class image, with its words and its turns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sharding.config import ConfigError
from training.config import RunConfig
from training.config.concepts import ConceptsFile
from training.dreambooth.class_images.wanted import ClassImage
from training.dreambooth.packing.concepts import ReadConcept, bucket_of, class_label, key_of
from training.dreambooth.packing.pictures import Picture
from training.dreambooth.packing.turns import Turn, balanced_repeats, class_turns
from training.dreambooth.packing.words import class_text, class_text_of, instance_text, stands_for_class


@dataclass(frozen=True)
class Row:
    """One sample of a chunk. label: NAME, or NAME/class of a class image."""

    label: str
    picture: Picture
    text: str
    loss_weight: float
    turn: Turn

    @property
    def key(self) -> str:
        return key_of(self.label, self.picture)


def repeats_of(concepts: Sequence[ReadConcept], file: ConceptsFile) -> dict[str, int]:
    """Return how often a stage's concepts are shown in an epoch."""
    if file.balance:
        return balanced_repeats({one.name: len(one.pictures) for one in concepts})
    return {one.name: one.concept.repeats for one in concepts}


def stage_rows(
    concepts: Sequence[ReadConcept], repeats: Mapping[str, int], made: Mapping[ClassImage, Picture], config: RunConfig
) -> list[Row]:
    """Return the rows of a stage's concepts. made: the class images that the concepts want.

    Raises ValueError where class images and pictures would have the same words, ConfigError when nothing has a bucket.
    """
    return [row for one in concepts for row in _concept_rows(one, repeats[one.name], made, config)]


def held_out_rows(concepts: Sequence[ReadConcept], config: RunConfig) -> list[Row]:
    """Return the rows of the pictures that no stage trains; what two concepts hold out stands once for each."""
    return [
        Row(one.name, picture, instance_text(one.concept, picture.caption or "", config.caption), 1.0, Turn())
        for one in concepts
        for picture in one.held_out
    ]


def _concept_rows(read: ReadConcept, repeats: int, made: Mapping[ClassImage, Picture], config: RunConfig) -> list[Row]:
    concept, settings = read.concept, config.caption

    def row(label: str, picture: Picture, text: str, turn: Turn) -> Row:
        if not text:
            raise ConfigError(
                f"concept {concept.name!r}: nothing is said of {picture.place}: its caption is empty, and so is the "
                "rest of the prompt; write a caption, or words into the prompt"
            )
        return Row(label, picture, text, concept.loss_weight, turn)

    texts = {picture: instance_text(concept, picture.caption or "", settings) for picture in read.pictures}
    rows = [row(concept.name, picture, text, Turn(repeats=repeats)) for picture, text in texts.items()]
    label = class_label(concept)
    if concept.class_images.images_per_image:
        classes = _class_pictures(read, made, config)
        turns = _turns(list(classes), read, repeats, config)
        return rows + [row(label, picture, text, turns[picture]) for picture, text in classes.items()]
    if stands_for_class(concept, config):
        same = {picture: class_text(concept, picture.caption or "", settings) for picture in read.pictures}
        return rows + [row(label, picture, text, Turn(repeats=repeats)) for picture, text in same.items()]
    return rows


def _class_pictures(read: ReadConcept, made: Mapping[ClassImage, Picture], config: RunConfig) -> dict[Picture, str]:
    """Return class images with their words: given ones first, then made ones, one for each picture, then the next."""
    concept = read.concept
    given = sorted(read.given, key=lambda picture: key_of(class_label(concept), picture))
    texts = {picture: class_text(concept, picture.caption or "", config.caption) for picture in given}
    seen = {picture.sha256 for picture in given}
    for image in read.wanted:
        picture = made[image]
        if picture.sha256 not in seen:
            seen.add(picture.sha256)
            texts[picture] = class_text_of(concept, image.prompt, config.caption)
    return texts


def _turns(classes: Sequence[Picture], read: ReadConcept, repeats: int, config: RunConfig) -> dict[Picture, Turn]:
    """Return the turns of class images; those without a bucket, which are never shown, take none from the others."""
    num_showings = repeats * sum(bucket_of(picture, config) is not None for picture in read.pictures)
    if not num_showings:
        raise ConfigError(
            f"concept {read.name!r}: none of its {len(read.pictures)} pictures has a bucket: see [buckets], and what "
            f"`python -m training plan --image {read.pictures[0].place}` says"
        )
    shown = [picture for picture in classes if bucket_of(picture, config) is not None]
    turns = dict.fromkeys(classes, Turn())
    if shown:
        turns.update(zip(shown, class_turns(len(shown), num_showings), strict=True))
    return turns


def concept_of(row: Row) -> str:
    """Return the name of the concept that a row belongs to."""
    return row.label.removesuffix("/class")


def is_class(row: Row) -> bool:
    """Tell whether a row is a class image."""
    return row.label != concept_of(row)
