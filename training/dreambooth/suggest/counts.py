"""How many pictures each concept has, as packing will count them, and how evenly they are shown. No torch."""

from dataclasses import dataclass
from pathlib import Path

from sharding.config import ConfigError, load_config
from training.config.concepts import FILEWORDS, ConceptsFile
from training.dreambooth.packing.pictures import read_folder
from training.dreambooth.packing.turns import balanced_repeats

UNEVEN = 1.5
"""Times as often as another: above it the doctor warns."""


@dataclass(frozen=True)
class Counts:
    """Of the pictures that are trained. by_concept, repeats: in the file's order."""

    file: ConceptsFile
    by_concept: dict[str, int]
    repeats: dict[str, int]
    notes: tuple[str, ...]

    @property
    def shown(self) -> dict[str, int]:
        """Return how many pictures an epoch shows of each concept."""
        return {name: number * self.repeats[name] for name, number in self.by_concept.items()}

    @property
    def class_images(self) -> int:
        """Return how many class images there will be."""
        concepts = self.file.concepts
        return sum(self.by_concept[one.name] * one.class_images.images_per_image for one in concepts)

    @property
    def showings(self) -> int:
        """Return how many pictures an epoch shows: of concepts, and as many class images where there are some."""
        with_class = {one.name for one in self.file.concepts if one.class_images.images_per_image}
        return sum(number * (1 + (name in with_class)) for name, number in self.shown.items())

    @property
    def advice(self) -> str:
        """Return what to do where concepts are shown unevenly; "" when they are not."""
        shown = self.shown
        if len(shown) < 2 or max(shown.values()) <= UNEVEN * min(shown.values()):
            return ""
        most, least = max(shown, key=shown.__getitem__), min(shown, key=shown.__getitem__)
        times = ", ".join(
            f"{name} {number}" for name, number in balanced_repeats(self.by_concept).items() if number > 1
        )
        return (
            f"an epoch shows {shown[most]} pictures of {most!r} and {shown[least]} of {least!r}: the larger one may "
            f"crush the smaller (wiki); put `balance = true` into the concepts file, which repeats {times}"
        )


def count_concepts(path: Path) -> Counts:
    """Read a file of concepts and count its pictures; files with the same bytes count once, held out ones do not.

    Raises ConfigError for a file that is none or a concept without a picture, FileNotFoundError for a folder that is
    not there, BrokenDataError for a caption that is not UTF-8.
    """
    file = load_config(path, ConceptsFile, [])
    class_folders = [Path(one.class_images.folder) for one in file.concepts if one.class_images.folder]
    numbers, notes = {}, []
    for concept in file.concepts:
        found = read_folder(
            concept.folder,
            caption_extension=concept.caption_extension,
            is_known=lambda _: True,  # decoded when they are packed
            without=class_folders,
        )
        numbers[concept.name] = len(found.pictures) - file.held_out
        if numbers[concept.name] < 1:
            raise ConfigError(
                f"concept {concept.name!r}: {concept.folder} has {len(found.pictures)} pictures, "
                f"{file.held_out} of them held out: nothing would be trained"
            )
        if found.broken:
            notes.append(f"{concept.name}: {len(found.broken)} pictures are broken, first {found.broken[0]}")
        missing = sum(picture.caption is None for picture in found.pictures)
        if missing and FILEWORDS in concept.prompt:
            notes.append(f"{concept.name}: {missing} pictures have no caption; pack-concepts will refuse them")
    repeats = {one.name: one.repeats for one in file.concepts}
    return Counts(file, numbers, balanced_repeats(numbers) if file.balance else repeats, tuple(notes))
