"""Count the pictures of a workspace: by dataset, period, model, format, size and shape.

Every count is DuckDB's, so memory does not grow with the dataset. Files are counted by `account`, words by
`word_counts`, duplicates by `duplicate_groups`. Opens no picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from typing import Any

from sharding.chunk import Chunk
from sharding.config import DatasetConfig
from sharding.reporting.questions import Questions, rows_of
from sharding.schema import HELD_OUT, MANIFEST, PLAN, SCORES, Workspace
from sharding.tables import list_parts, part_metadata

ASPECTS = ((1, 4), (1, 3), (1, 2), (9, 16), (2, 3), (3, 4), (4, 5), (1, 1),
           (5, 4), (4, 3), (3, 2), (16, 9), (2, 1), (3, 1), (4, 1))  # fmt: skip
"""width : height; a picture is counted at the nearest ratio."""
_MEGAPIXELS = (0.5, 0.768, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_KIBIBYTES = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


@dataclass(frozen=True)
class DatasetCount:
    """A dataset as planned and as packed. All but `num_held_out` are without the held-out chunk."""

    name: str
    num_images: int
    num_chunks: int
    num_in_last: int
    """Images of its last chunk."""
    num_held_out: int
    num_trained_per_epoch: int
    """The sum of the repeats."""
    num_packed_images: int
    num_packed_chunks: int
    num_bytes: int
    """Of its tars."""


@dataclass(frozen=True)
class PeriodCount:
    """Planned images of a period. name "" has no date, or none that a period holds; its years are 0."""

    name: str
    first_year: int
    last_year: int
    num_images: int


@dataclass(frozen=True)
class ModelCount:
    """What a model has said so far."""

    name: str
    model: str
    revision: str
    num_images: int
    num_failed: int


@dataclass(frozen=True)
class FormatCount:
    """Kept files of one format."""

    name: str
    num_files: int
    num_bytes: int
    num_pass_through: int


@dataclass(frozen=True)
class PixelCount:
    """Pixels (width × height) of the kept files."""

    smallest: int
    median: int
    largest: int


@dataclass(frozen=True)
class Histogram:
    """Kept files by bin. bins: (label, files)."""

    name: str
    bins: tuple[tuple[str, int], ...]


def count_datasets(
    questions: Questions, workspace: Workspace, chunks: Sequence[Chunk], *, order: Sequence[str]
) -> tuple[DatasetCount, ...]:
    """Count by dataset; chunks: the plain ones; order: names that stand first."""
    plan = rows_of(list_parts(workspace.plan), PLAN)
    rows = questions.ask(
        f"select dataset, chunk, count(*) as n, sum(repeats)::bigint as repeats from {plan} group by all order by all"
    )
    planned: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        planned.setdefault(row["dataset"], []).append(row)
    packed: dict[str, list[Chunk]] = {}
    for chunk in chunks:
        packed.setdefault(chunk.folder.parent.name, []).append(chunk)
    counts = []
    for name in sorted({*planned, *packed}, key=lambda name: (place_in(order, name), name)):
        trained = [row for row in planned.get(name, []) if row["chunk"] != HELD_OUT]
        infos = [chunk.info for chunk in packed.get(name, []) if not chunk.info.is_held_out]
        counts.append(
            DatasetCount(
                name=name,
                num_images=sum(row["n"] for row in trained),
                num_chunks=len(trained),
                num_in_last=trained[-1]["n"] if trained else 0,
                num_held_out=sum(row["n"] for row in planned.get(name, []) if row["chunk"] == HELD_OUT),
                num_trained_per_epoch=sum(row["n"] if row["repeats"] is None else row["repeats"] for row in trained),
                num_packed_images=sum(info.num_samples for info in infos),
                num_packed_chunks=len(infos),
                num_bytes=sum(shard.num_bytes for info in infos for shard in info.shards),
            )
        )
    return tuple(counts)


def dataset_order(config: DatasetConfig) -> list[str]:
    """Return the datasets as the config names them: periods where a source is filed by date, then the others."""
    datasets = [source.dataset or name for name, source in config.sources.items()]
    names = [period for dataset in datasets if dataset == "{period}" for period in config.periods]
    return list(dict.fromkeys(names + [dataset for dataset in datasets if dataset != "{period}"]))


def place_in(order: Sequence[str], name: str) -> int:
    """Return a name's place in an order; what is not in it comes last."""
    return order.index(name) if name in order else len(order)


def count_periods(questions: Questions, workspace: Workspace, config: DatasetConfig) -> tuple[PeriodCount, ...]:
    """Count planned images by period, in the config's order."""
    plan = rows_of(list_parts(workspace.plan), PLAN)
    rows = questions.ask(f"select coalesce(period, '') as period, count(*) as n from {plan} group by all order by all")
    found = {row["period"]: row["n"] for row in rows}
    names = [*config.periods, *(name for name in found if name and name not in config.periods)]
    counts = [PeriodCount(name, *config.periods.get(name, (0, 0)), found.get(name, 0)) for name in names if found]
    return (*counts, *([PeriodCount("", 0, 0, found[""])] if found.get("") else []))


def count_models(questions: Questions, workspace: Workspace) -> tuple[ModelCount, ...]:
    """Count what each model of annotations/ has said."""
    counts = []
    for folder in sorted(path for path in (workspace.root / "annotations").glob("*") if path.is_dir()):
        if parts := list_parts(folder):
            facts = part_metadata(parts[0])
            row = questions.ask_one(
                f"select count(*) as n, count(*) filter (status <> 'ok') as failed from {rows_of(parts, SCORES)}"
            )
            counts.append(
                ModelCount(folder.name, facts.get("model", ""), facts.get("revision", ""), row["n"], row["failed"])
            )
    return tuple(counts)


def count_formats(questions: Questions, workspace: Workspace) -> tuple[FormatCount, ...]:
    """Count kept files by format, most files first."""
    rows = questions.ask(
        "select format, count(*) as n, sum(num_bytes)::bigint as b, count(*) filter (is_pass_through) as p "
        f"from {_kept(workspace)} group by format order by n desc, format"
    )
    return tuple(FormatCount(row["format"] or "", row["n"], row["b"] or 0, row["p"]) for row in rows)


def count_pixels(questions: Questions, workspace: Workspace) -> PixelCount:
    """Return the smallest, the median and the largest number of pixels of the kept files."""
    row = questions.ask_one(
        "select min(n)::bigint as a, quantile_disc(n, 0.5)::bigint as b, max(n)::bigint as c "
        f"from (select width::bigint * height as n from {_kept(workspace)})"
    )
    return PixelCount(row["a"] or 0, row["b"] or 0, row["c"] or 0)


def count_sizes(questions: Questions, workspace: Workspace) -> tuple[Histogram, ...]:
    """Return histograms of kept files by file size, pixels and aspect ratio; none before `dedupe`."""
    kept = _kept(workspace)
    ratios = [width / height for width, height in ASPECTS]
    aspects = [f"{width}:{height}" for width, height in ASPECTS]
    scales = (
        ("file size", "num_bytes / 1024.0", _KIBIBYTES, _labels(_KIBIBYTES, "KiB")),
        ("pixels", "width::double * height / 1e6", _MEGAPIXELS, _labels(_MEGAPIXELS, "MP")),
        ("aspect ratio", "width / height::double", [sqrt(a * b) for a, b in pairwise(ratios)], aspects),
    )
    histograms = []
    for name, value, edges, labels in scales:
        cases = " ".join(f"when value < {edge!r} then {place}" for place, edge in enumerate(edges))
        rows = questions.ask(
            f"select case {cases} else {len(edges)} end as place, count(*) as n "
            f"from (select {value} as value from {kept} where height > 0) group by place"
        )
        found = {row["place"]: row["n"] for row in rows}
        if found:
            bins = tuple((label, found.get(place, 0)) for place, label in enumerate(labels))
            histograms.append(Histogram(name, bins))
    return tuple(histograms)


def _labels(edges: Sequence[float], unit: str) -> list[str]:
    between = [f"{low:,}–{high:,} {unit}" for low, high in pairwise(edges)]
    return [f"< {edges[0]:,} {unit}", *between, f"≥ {edges[-1]:,} {unit}"]


def _kept(workspace: Workspace) -> str:
    return rows_of(list_parts(workspace.kept), MANIFEST)
