"""Measure what a character's name shall carry: the tags that most of its pictures share. No captions are written.

The result is a CSV (character, tag, share, pictures), to be looked at and named as a policy's `traits`.
"""

import csv
import io
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from captioning.composer import Composer
from captioning.config import CaptioningConfig
from captioning.lexicon import group_matcher
from captioning.tag_files import shipped_lists
from captioning.words import Ids
from sharding.config import ConfigError
from sharding.files import replacing
from sharding.runlog import Progress
from sharding.schema import Workspace
from sharding.tables import list_parts

_NOT_TRAITS = "none"


@dataclass(frozen=True)
class Trait:
    """A tag that pictures of a character share."""

    character: str
    tag: str
    share: float
    """Of the pictures that show this character alone."""
    num_pictures: int


@dataclass(frozen=True)
class TraitsReport:
    """What one call of `measure_traits` found."""

    traits: list[Trait]
    """By character, the largest share first."""
    num_characters: int
    """With pictures enough."""
    output: Path
    seconds: float

    def summary(self) -> str:
        """Return a few lines for people."""
        return (
            f"{len(self.traits):,} traits of {self.num_characters:,} characters in {self.seconds:.1f} s\n"
            f'  written to {self.output}; look at it, then name it in the policy: traits = "{self.output}"'
        )


def trait_kinds() -> tuple[str, ...]:
    """Return the kinds of traits that come with the package."""
    return tuple(kind for kind in shipped_lists("traits") if kind != _NOT_TRAITS)


def measure_traits(
    config: CaptioningConfig,
    workspace: Workspace,
    *,
    policy: str,
    output: Path,
    kinds: Sequence[str],
    share: float = 0.5,
    min_pictures: int = 10,
) -> TraitsReport:
    """Write the tags of some kinds that at least `share` of a character's pictures have.

    Only pictures with a single character tag count, only characters with at least min_pictures of them. Tags are those
    that pass in the policy, with aliases applied. Raises ConfigError, FileNotFoundError, AnnotationMissingError.
    """
    table = shipped_lists("traits")
    if unknown := [kind for kind in kinds if kind not in trait_kinds()]:
        raise ConfigError(f"--kinds {unknown[0]!r}: unknown; known: {', '.join(trait_kinds())}")
    if not 0 < share <= 1 or min_pictures < 1:
        raise ConfigError(
            f"--share must be above 0 and at most 1, --min-pictures at least 1; got {share}, {min_pictures}"
        )
    kept = list_parts(workspace.kept)
    if not kept:
        raise FileNotFoundError(f"{workspace.kept}: no parts; run `python -m sharding dedupe` first")
    kind_of = group_matcher({_NOT_TRAITS: table[_NOT_TRAITS], **{kind: table[kind] for kind in kinds}})
    started = time.monotonic()
    composer = Composer(config, workspace, policy=policy)
    pictures, together = Counter[int](), Counter[tuple[int, int]]()
    with Progress(len(kept), unit="parts", title="traits") as progress:
        for part in kept:
            _count_part(composer, part, pictures, together)
            progress.advance()
    names = composer.lexicon.names()
    traits = [
        Trait(names[character][0], names[tag][0], number / pictures[character], pictures[character])
        for (character, tag), number in together.items()
        if pictures[character] >= min_pictures
        and number / pictures[character] >= share
        and names[tag][1] == "general"
        and kind_of(names[tag][0]) not in ("", _NOT_TRAITS)
    ]
    traits.sort(key=lambda it: (it.character, -it.share, it.tag))
    _write(output, traits)
    num_characters = sum(number >= min_pictures for number in pictures.values())
    return TraitsReport(traits, num_characters, output, time.monotonic() - started)


def _count_part(composer: Composer, part: Path, pictures: Counter[int], together: Counter[tuple[int, int]]) -> None:
    stream, known = composer.tags(part)
    num_tags = max(len(known.words), 1)
    keys = np.unique(stream.rows * num_tags + stream.tags)
    rows, tags = keys // num_tags, keys % num_tags
    is_character = known.is_character[tags] > 0
    if not is_character.any():
        return
    in_row = np.bincount(rows[is_character], minlength=int(rows.max()) + 1)
    alone = is_character & (in_row[rows] == 1)
    character_of: Ids = np.full(len(in_row), -1, dtype=np.int64)
    character_of[rows[alone]] = tags[alone]
    _add(pictures, tags[alone])
    chosen = ~is_character & (character_of[rows] >= 0)
    pairs, counts = np.unique(character_of[rows[chosen]] * num_tags + tags[chosen], return_counts=True)
    for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
        together[divmod(pair, num_tags)] += count


def _add(counter: Counter[int], values: Ids) -> None:
    numbers, counts = np.unique(values, return_counts=True)
    counter.update(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))


def _write(path: Path, traits: Sequence[Trait]) -> None:
    text = io.StringIO()
    text.write("# character, tag, share of its pictures, pictures\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows((it.character, it.tag, f"{it.share:.3f}", it.num_pictures) for it in traits)
    with replacing(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")
