"""A concept as it lies there: its pictures, those held out of training, and the class images it wants."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sharding.config import ConfigError
from sharding.files import digest_of
from training.buckets import Bucket, BucketError
from training.config import RunConfig
from training.config.concepts import FILEWORDS, ConceptConfig, ConceptsFile
from training.dreambooth.class_images.wanted import ClassImage, Instance, class_images_of
from training.dreambooth.packing.pictures import Found, Picture, read_folder
from training.dreambooth.packing.words import first_line, has_class
from training.errors import BrokenDataError
from training.plans import bucket_settings
from training.showings import fit_or_reason


@dataclass(frozen=True)
class ReadConcept:
    """A concept with its pictures read."""

    concept: ConceptConfig
    pictures: tuple[Picture, ...]
    """What is trained."""
    held_out: tuple[Picture, ...]
    given: tuple[Picture, ...]
    """Class images from class_images.folder."""
    wanted: tuple[ClassImage, ...]
    """Class images that the model makes, until there are images_per_image for each picture."""
    broken: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.concept.name


def key_of(label: str, picture: Picture) -> str:
    """Return the key of a picture as one of a concept (label NAME) or of its class (NAME/class)."""
    return digest_of([label, picture.sha256])[:16]


def class_label(concept: ConceptConfig) -> str:
    """Return what the index calls class images of a concept."""
    return f"{concept.name}/class"


def bucket_of(picture: Picture, config: RunConfig) -> Bucket | None:
    """Return the bucket of a picture, None when it has none."""
    own = fit_or_reason(picture.facts.width, picture.facts.height, bucket_settings(config))
    return None if isinstance(own, BucketError) else own.placement.bucket


def read_concepts(
    config: RunConfig, file: ConceptsFile, names: Sequence[str], *, known_keys: Mapping[str, object]
) -> list[ReadConcept]:
    """Read the concepts of these names, in the file's order. known_keys: of pictures that were decoded once.

    Raises ConfigError for a concept without a picture that can be trained, FileNotFoundError for a folder that is not
    there, BrokenDataError for captions that are missing or not text.
    """
    concepts = [concept for concept in file.concepts if concept.name in names]
    found = {concept.name: _read_instances(concept, file, known_keys) for concept in concepts}
    chosen = {name: _held_out(one, file.held_out) for name, one in found.items()}
    out = {sha256 for own in chosen.values() for sha256 in own}
    read = []
    for concept in concepts:
        one = found[concept.name]
        trained = tuple(picture for picture in one.pictures if picture.sha256 not in out)
        if not trained:
            raise ConfigError(_nothing_in(concept, one, held_out=file.held_out))
        plain = ReadConcept(
            concept=concept,
            pictures=trained,
            held_out=tuple(picture for picture in one.pictures if picture.sha256 in chosen[concept.name]),
            given=(),
            wanted=(),
            broken=one.broken,
            notes=(*one.notes, *_notes(concept, trained, config)),
        )
        read.append(_with_class_images(plain, file, config, known_keys))
    return read


def _read_instances(concept: ConceptConfig, file: ConceptsFile, known_keys: Mapping[str, object]) -> Found:
    class_folders = [Path(one.class_images.folder) for one in file.concepts if one.class_images.folder]
    if concept.folder.resolve() in [folder.resolve() for folder in class_folders]:
        raise ConfigError(f"concept {concept.name!r}: folder {concept.folder} is also a class_images.folder")
    one = read_folder(
        concept.folder,
        caption_extension=concept.caption_extension,
        is_known=_known(concept.name, known_keys),
        without=class_folders,
    )
    missing = [picture for picture in one.pictures if picture.caption is None]
    if missing and FILEWORDS in concept.prompt:
        raise BrokenDataError(
            f"concept {concept.name!r}: {len(missing)} of {len(one.pictures)} pictures have no caption, first "
            f"{missing[0].place}: write it into a file of the same name with {concept.caption_extension}, or give a "
            f"prompt without {FILEWORDS}"
        )
    return one


def _known(label: str, known_keys: Mapping[str, object]) -> Callable[[str], bool]:
    return lambda sha256: digest_of([label, sha256])[:16] in known_keys


def _held_out(found: Found, number: int) -> set[str]:
    """Return the contents that are held out, which adding or moving files changes little."""
    return set(
        sorted((one.sha256 for one in found.pictures), key=lambda sha256: digest_of(["held out", sha256]))[:number]
    )


def _nothing_in(concept: ConceptConfig, found: Found, *, held_out: int) -> str:
    where = f"concept {concept.name!r}: {concept.folder}"
    if found.pictures:
        return f"{where}: all of its {len(found.pictures)} pictures are held out; set held_out below {held_out}"
    broken = f"; {len(found.broken)} are broken, first {found.broken[0]}" if found.broken else ""
    return f"{where}: there is no picture to train in it{broken}"


def _notes(concept: ConceptConfig, pictures: Sequence[Picture], config: RunConfig) -> list[str]:
    notes, made = [], concept.class_images
    if concept.token and not made.token:
        notes.append(f"token {concept.token!r} is not looked at: there is no class_images.token whose place it takes")
    if made.folder and not made.images_per_image:
        notes.append(f"class_images.folder {made.folder} is not looked at: images_per_image is 0")
    if homeless := [picture for picture in pictures if bucket_of(picture, config) is None]:
        notes.append(f"{len(homeless)} pictures have no bucket and are not trained, first {homeless[0].place}")
    return notes


def _with_class_images(
    read: ReadConcept, file: ConceptsFile, config: RunConfig, known_keys: Mapping[str, object]
) -> ReadConcept:
    concept, made = read.concept, read.concept.class_images
    if not made.images_per_image:
        if config.of_dreambooth.prior_target == "base_model" and not has_class(concept):
            note = "nothing holds it to what the model knew: give class_images.prompt, or token and class_images.token"
            return replace(read, notes=(*read.notes, note))
        return read
    instances = [
        Instance(
            key_of(concept.name, picture),
            first_line(picture.caption or "", config.caption),
            bucket.width,
            bucket.height,
        )
        for picture in read.pictures
        if (bucket := bucket_of(picture, config)) is not None
    ]
    wanted = class_images_of(concept, instances, seed=config.seed)
    if not made.folder:
        return replace(read, wanted=tuple(wanted))
    found = read_folder(
        Path(made.folder),
        caption_extension=concept.caption_extension,
        is_known=_known(class_label(concept), known_keys),
        without=[other.folder for other in file.concepts],
    )
    return replace(
        read,
        given=found.pictures,
        wanted=tuple(wanted[: max(0, len(wanted) - len(found.pictures))]),
        broken=read.broken + found.broken,
        notes=read.notes + found.notes,
    )
