"""What packing concepts came to, as text: per stage and concept, pictures, class images, repeats, exposures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from training.config import RunConfig
from training.config.concepts import ConceptsFile
from training.dreambooth.packing.chunks import Wanted
from training.dreambooth.packing.concepts import ReadConcept, bucket_of
from training.dreambooth.packing.words import stands_for_class
from training.stages import Stage


@dataclass(frozen=True)
class StageContent:
    """What a stage shows."""

    stage: Stage
    concepts: tuple[ReadConcept, ...]
    repeats: Mapping[str, int]
    wanted: Wanted


@dataclass(frozen=True)
class ConceptLine:
    """One concept in one stage. Counts of files; exposures are of pictures and class images."""

    name: str
    num_pictures: int
    num_given: int
    num_made: int
    is_own_class: bool
    """Its own pictures stand for class images."""
    repeats: int
    per_epoch: int
    in_all: int

    def __str__(self) -> str:
        classes = "its own" if self.is_own_class else f"{self.num_given:,} + {self.num_made:,}"
        return (
            f"  {self.name:<24} {self.num_pictures:>8,} {classes:>15} {self.repeats:>8,} {self.per_epoch:>10,}"
            f" {self.in_all:>10,}  {epochs_advice(self.num_pictures)}"
        )


_HEADER = (
    f"  {'concept':<24} {'pictures':>8} {'given + made':>15} {'repeats':>8} {'an epoch':>10} {'in all':>10}"
    "  epochs by the wiki"
)


@dataclass(frozen=True)
class ChunkLine:
    """A stage's chunk. what: packed, current, or what a dry run would do."""

    name: str
    epochs: int
    what: str
    concepts: tuple[ConceptLine, ...]

    def __str__(self) -> str:
        return "\n".join([f"{self.name}: {self.epochs:,} epochs, {self.what}", _HEADER, *map(str, self.concepts)])


@dataclass(frozen=True)
class PackingReport:
    """What was done, or in a dry run would be."""

    chunks: tuple[ChunkLine, ...]
    held_out: str
    """What became of the held-out chunk; empty without one."""
    removed: tuple[str, ...]
    broken: tuple[str, ...]
    notes: tuple[str, ...]
    next: tuple[str, ...]

    def text(self) -> str:
        """Return the report for people."""
        lines = list(map(str, self.chunks))
        lines += [self.held_out] * bool(self.held_out)
        lines += [f"{name}: removed, it is no stage of this run" for name in self.removed]
        lines += [f"broken, left out: {one}" for one in self.broken]
        lines += [f"note: {one}" for one in self.notes]
        return "\n".join([*lines, *self.next])


def epochs_advice(num_pictures: int) -> str:
    """Return the epochs that the wiki gives for so many pictures."""
    if num_pictures < 15:
        return "over 100"
    return "60 to 100" if num_pictures <= 30 else "under 100, fewer the more pictures"


def concept_line(read: ReadConcept, stage: Stage, repeats: int, *, config: RunConfig) -> ConceptLine:
    """Return a concept's line; class images are shown as often as pictures."""
    is_own_class = stands_for_class(read.concept, config)
    has_class_images = is_own_class or bool(read.given or read.wanted)
    num_shown = sum(bucket_of(picture, config) is not None for picture in read.pictures)
    per_epoch = num_shown * repeats * (1 + has_class_images)
    return ConceptLine(
        read.name, len(read.pictures), len(read.given), len(read.wanted), is_own_class, repeats, per_epoch,
        per_epoch * stage.epochs,
    )  # fmt: skip


def notes_of(contents: Sequence[StageContent], file: ConceptsFile, concepts: Sequence[ReadConcept]) -> list[str]:
    """Return what is worth knowing about all of it."""
    used = {one.name for one in concepts}
    notes = [f"concept {one.name}: {note}" for one in concepts for note in one.notes]
    notes += [f"concept {one.name}: is in no stage" for one in file.concepts if one.name not in used]
    names_of: dict[str, list[str]] = {}
    for one in concepts:
        for picture in one.pictures:
            names_of.setdefault(picture.sha256, []).append(one.name)
    shared = [names for names in names_of.values() if len(names) > 1]
    if shared:
        notes.append(f"{len(shared)} pictures belong to several concepts, first to {' and '.join(shared[0])}")
    for content in contents:
        stage, every = content.stage, max(row.turn.every for row in content.wanted.rows)
        if every > stage.epochs:
            notes.append(
                f"{stage.chunk}: class images need {every} epochs to come round, there are {stage.epochs}: some are "
                "never shown; ask for fewer images_per_image"
            )
    return notes


def next_steps(config: RunConfig, run_toml: str, *, has_held_out: bool) -> list[str]:
    """Return what to do next. run_toml: as it was given on the command line."""
    steps = [f"next: python -m training plan {run_toml}", f"then: python -m training run {run_toml} --run-dir RUN_DIR"]
    if has_held_out and config.validation.chunk is None:
        steps.append("and: --set validation.chunk=concepts/held-out charts the loss on the held-out pictures")
    return steps
