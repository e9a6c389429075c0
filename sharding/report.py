"""Account for every file and picture of a workspace: `python -m sharding report DATASET.toml [--html FILE]`.

Each listed file is counted exactly once: packed, dropped (by the first stage that dropped it) or waiting for a
stage. Reads tables and indexes, no pixels. The numbers as text, HTML and a dataset card: `report_tables`,
`report_html`, `card`.
"""

from dataclasses import dataclass
from typing import Any

from sharding.chunk import list_chunks
from sharding.config import DatasetConfig
from sharding.reporting.account import STAGES, SourceCount, StageCount, take_account
from sharding.reporting.census import (
    DatasetCount,
    FormatCount,
    Histogram,
    ModelCount,
    PeriodCount,
    PixelCount,
    count_datasets,
    count_formats,
    count_models,
    count_periods,
    count_pixels,
    count_sizes,
    dataset_order,
)
from sharding.reporting.chunk_list import ChunkCount, count_chunks
from sharding.reporting.duplicate_groups import Duplicates, count_duplicates
from sharding.reporting.questions import Questions
from sharding.reporting.word_counts import WordGroup, count_words
from sharding.schema import Workspace

NUM_SAMPLE_GROUPS = 8
__all__ = ["STAGES", "Report", "make_report", "render_text"]


@dataclass(frozen=True)
class Report:
    """The account of a workspace."""

    name: str
    sources: tuple[SourceCount, ...]
    drops: tuple[StageCount, ...]
    waiting: tuple[StageCount, ...]
    num_unlisted_packed: int
    """Packed samples whose file is in no listing."""
    datasets: tuple[DatasetCount, ...]
    periods: tuple[PeriodCount, ...]
    words: tuple[WordGroup, ...]
    """Of `policy`."""
    policy: str
    custom_words: tuple[tuple[str, str], ...]
    """(source, template) of the policy."""
    models: tuple[ModelCount, ...]
    formats: tuple[FormatCount, ...]
    pixels: PixelCount
    histograms: tuple[Histogram, ...]
    duplicates: Duplicates
    chunks: tuple[ChunkCount, ...]

    @property
    def num_files(self) -> int:
        return sum(source.num_files for source in self.sources)

    @property
    def num_packed(self) -> int:
        return sum(source.num_packed for source in self.sources)

    @property
    def num_dropped(self) -> int:
        return sum(drop.num_files for drop in self.drops)

    @property
    def num_waiting(self) -> int:
        return sum(stage.num_files for stage in self.waiting)

    @property
    def num_images(self) -> int:
        """Planned images, without the held-out ones."""
        return sum(dataset.num_images for dataset in self.datasets)

    @property
    def num_chunks(self) -> int:
        """Planned chunks, without the held-out and the combined ones."""
        return sum(dataset.num_chunks for dataset in self.datasets)

    @property
    def num_combined_chunks(self) -> int:
        return sum(chunk.is_combined for chunk in self.chunks)

    @property
    def adds_up(self) -> bool:
        """Whether packed, dropped and waiting files sum to the listed ones."""
        return self.num_files == self.num_packed + self.num_dropped + self.num_waiting

    @property
    def account(self) -> str:
        """The sum in words: `60 files = 48 packed + 12 dropped`."""
        waiting = f" + {self.num_waiting:,} waiting" if self.num_waiting else ""
        sign = "=" if self.adds_up else "≠"
        return f"{self.num_files:,} files {sign} {self.num_packed:,} packed + {self.num_dropped:,} dropped{waiting}"

    def summary(self) -> str:
        return render_text(self)


def make_report(config: DatasetConfig, workspace: Workspace, *, seed: int = 0) -> Report:
    """Read every table and count. A stage that has not run has counted nothing; its files wait for it.

    seed: of the sample of duplicate groups.
    """
    chunks = list_chunks(workspace.chunks, with_held_out=True)
    plain = [chunk for chunk in chunks if not chunk.info.is_combined]
    order = dataset_order(config)
    with Questions() as questions:
        account = take_account(questions, workspace, plain)
        return Report(
            name=config.name,
            sources=account.sources,
            drops=account.drops,
            waiting=account.waiting,
            num_unlisted_packed=account.num_unlisted_packed,
            datasets=count_datasets(questions, workspace, plain, order=order),
            periods=count_periods(questions, workspace, config),
            words=count_words(questions, workspace, config),
            policy=config.pack.policy,
            custom_words=_custom_words(config),
            models=count_models(questions, workspace),
            formats=count_formats(questions, workspace),
            pixels=count_pixels(questions, workspace),
            histograms=count_sizes(questions, workspace),
            duplicates=count_duplicates(questions, workspace, num_groups=NUM_SAMPLE_GROUPS, seed=seed),
            chunks=count_chunks(questions, workspace, chunks, order=order),
        )


def _custom_words(config: DatasetConfig) -> tuple[tuple[str, str], ...]:
    policy: Any = config.policies.get(config.pack.policy, {})
    custom: Any = policy.get("custom", {}) if isinstance(policy, dict) else {}
    return (
        tuple((str(source), str(template)) for source, template in custom.items()) if isinstance(custom, dict) else ()
    )


def render_text(report: Report) -> str:
    """Return the report as text: the account first, then its tables."""
    from sharding.reporting.tables import report_tables, table_as_text

    lines = [f"{report.name}: {report.account}"]
    if not report.adds_up:
        lines.append("the sums do not add up: this is a mistake of the program, please report it with `--json`")
    if report.num_unlisted_packed:
        lines.append(f"besides, {report.num_unlisted_packed:,} packed samples come from files that are not listed now")
    for table in report_tables(report):
        lines += ["", *table_as_text(table)]
    return "\n".join(lines)
