"""Bring the chunks of a run's stages up to date: `python -m training pack-concepts RUN.toml`.

Everything is read first: pictures, captions, class images. Only then are chunks written, each one as a whole, and only
those whose content changed; the same content gives the same bytes. Pictures and captions are never written to.
"""

import fnmatch
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from sharding.chunk import Chunk
from sharding.config import ConfigError, load_config
from sharding.files import digest_of
from sharding.images import ImageFacts, probe
from sharding.schema import Workspace
from training.config import RunConfig
from training.config.concepts import ConceptsFile
from training.dreambooth.class_images.wanted import ClassImage
from training.dreambooth.packing.chunks import (
    HELD_OUT,
    Wanted,
    is_current,
    known_keys,
    own_chunks,
    remove_chunk,
    write_chunk,
)
from training.dreambooth.packing.concepts import ReadConcept, read_concepts
from training.dreambooth.packing.drawing import FOLDER, draw_class_images
from training.dreambooth.packing.pictures import Picture
from training.dreambooth.packing.report import (
    ChunkLine,
    PackingReport,
    StageContent,
    concept_line,
    next_steps,
    notes_of,
)
from training.dreambooth.packing.rows import held_out_rows, repeats_of, stage_rows
from training.dreambooth.packing.words import has_class
from training.stages import Stage, stages_of

logger = logging.getLogger(__name__)


class Draw(Protocol):
    """See `drawing.draw_class_images`."""

    def __call__(
        self, config: RunConfig, wanted: Sequence[ClassImage], folder: Path, *, dry_run: bool
    ) -> Sequence[Path | None]: ...


def pack_concepts(
    config: RunConfig, *, run_toml: str = "RUN.toml", dry_run: bool = False, draw: Draw = draw_class_images
) -> PackingReport:
    """Pack what a run's stages show. dry_run: read all, make and write nothing.

    Raises ConfigError for settings that cannot be (a stage's concept that is not in the file, a folder without a
    picture), FileNotFoundError for a folder or file that is not there, BrokenDataError for captions that are missing
    or no text, ChunkError for a chunk of the name that is not of concepts.
    """
    stages, file = _stages(config)
    workspace = Workspace(config.data.workspace)
    with own_chunks(workspace, dry_run=dry_run) as chunks:
        used = {name for stage in stages for name in _names(stage, file)}
        concepts = read_concepts(config, file, sorted(used), known_keys=known_keys(chunks))
        _require_prior(config, concepts)
        stand_ins = {image: _stand_in(image, workspace.root / FOLDER) for one in concepts for image in one.wanted}
        _contents(stages, file, concepts, stand_ins, config)  # what is wrong with words is told before any is drawn
        made = stand_ins | _made(list(stand_ins), config, workspace.root / FOLDER, draw, dry_run=dry_run)
        contents = _contents(stages, file, concepts, made, config)
        held_out = held_out_rows(concepts, config)
        wanted = [*(one.wanted for one in contents), *[Wanted(HELD_OUT, tuple(held_out), False)] * bool(held_out)]
        gone = [chunk for name, chunk in chunks.items() if name not in {one.name for one in wanted}]
        done = _bring_up_to_date(workspace, wanted, chunks, gone, config=config, dry_run=dry_run)
    return PackingReport(
        chunks=tuple(_chunk_line(one, config, what=done[one.wanted.name]) for one in contents),
        held_out=f"{HELD_OUT}: {len(held_out):,} pictures, {done[HELD_OUT]}" if held_out else "",
        removed=tuple(chunk.name for chunk in gone),
        broken=tuple(broken for one in concepts for broken in one.broken),
        notes=(*notes_of(contents, file, concepts), *_to_be_made(made), *_not_in_run(config, stages)),
        next=tuple(next_steps(config, run_toml, has_held_out=bool(held_out))),
    )


def _stages(config: RunConfig) -> tuple[tuple[Stage, ...], ConceptsFile]:
    path = config.of_dreambooth.concepts
    if path is None:
        raise ConfigError("dreambooth.concepts is not set: which file says what is taught?")
    file = load_config(path, ConceptsFile)
    stages, names = stages_of(config), [one.name for one in file.concepts]
    for stage in stages:
        if unknown := [name for name in stage.concepts if name not in names]:
            raise ConfigError(
                f"stage {stage.values.name!r}: there is no concept {unknown[0]!r} in {path}; "
                f"there are {', '.join(names)}"
            )
    return stages, file


def _require_prior(config: RunConfig, concepts: Sequence[ReadConcept]) -> None:
    has_prior = any(one.concept.class_images.images_per_image or has_class(one.concept) for one in concepts)
    if config.of_dreambooth.prior_target == "base_model" and not has_prior:
        raise ConfigError(
            'dreambooth.prior_target "base_model": no concept has class images, and none says what it is one of: give '
            "class_images.prompt, or token and class_images.token; its pictures are then shown with the class's words"
        )


def _names(stage: Stage, file: ConceptsFile) -> tuple[str, ...]:
    return stage.concepts or tuple(one.name for one in file.concepts)


def _contents(
    stages: Sequence[Stage],
    file: ConceptsFile,
    concepts: Sequence[ReadConcept],
    made: Mapping[ClassImage, Picture],
    config: RunConfig,
) -> list[StageContent]:
    """Return what each stage's chunk holds. Raises what `stage_rows` raises."""
    contents = []
    seen: set[str] = set()
    for stage in stages:
        own = tuple(one for one in concepts if one.name in _names(stage, file))
        repeats = repeats_of(own, file)
        rows = stage_rows(own, repeats, made, config)
        keys = {row.key for row in rows}
        wanted = Wanted(stage.chunk, tuple(rows), shares_samples=bool(seen & keys))
        contents.append(StageContent(stage, own, repeats, wanted))
        seen |= keys
    return contents


def _made(
    wanted: Sequence[ClassImage], config: RunConfig, folder: Path, draw: Draw, *, dry_run: bool
) -> dict[ClassImage, Picture]:
    """Return the pictures of class images; in a dry run of those that are there."""
    paths = draw(config, wanted, folder, dry_run=dry_run) if wanted else ()
    return {image: _picture(path, folder) for image, path in zip(wanted, paths, strict=True) if path is not None}


def _picture(path: Path, folder: Path) -> Picture:
    data = path.read_bytes()
    return Picture(folder, path.name, hashlib.sha256(data).hexdigest(), len(data), probe(data), None)


def _stand_in(image: ClassImage, folder: Path) -> Picture:
    facts = ImageFacts("png", image.width, image.height, "RGB", False, False, True, None)
    return Picture(folder, "", digest_of(asdict(image)), 0, facts, None)


def _to_be_made(made: Mapping[ClassImage, Picture]) -> list[str]:
    number = sum(not picture.path for picture in made.values())
    return [f"{number:,} class images are to be drawn"] * (number > 0)


def _bring_up_to_date(
    workspace: Workspace,
    wanted: Sequence[Wanted],
    chunks: Mapping[str, Chunk],
    gone: Sequence[Chunk],
    *,
    config: RunConfig,
    dry_run: bool,
) -> dict[str, str]:
    """Write what is not current and take away what no stage has; return by chunk what was done, or would be."""
    done = {}
    for one in wanted:
        if is_current(chunks.get(one.name), one):
            done[one.name] = "nothing has changed"
            continue
        if not dry_run:
            write_chunk(workspace, one, seed=config.seed)
            logger.info("%s packed: %s samples", one.name, f"{len(one.rows):,}")
        done[one.name] = "would be packed" if dry_run else "packed"
    for chunk in gone:
        if not dry_run:
            remove_chunk(chunk)
    return done


def _chunk_line(content: StageContent, config: RunConfig, *, what: str) -> ChunkLine:
    stage = content.stage
    lines = (concept_line(one, stage, content.repeats[one.name], config=config) for one in content.concepts)
    return ChunkLine(stage.chunk, stage.epochs, what, tuple(lines))


def _not_in_run(config: RunConfig, stages: Sequence[Stage]) -> list[str]:
    patterns = config.data.chunks
    left_out = [stage.chunk for stage in stages if not any(fnmatch.fnmatch(stage.chunk, one) for one in patterns)]
    return [f'{name}: not in data.chunks {list(patterns)}; set data.chunks = ["concepts/*"]' for name in left_out]
