"""A report's numbers as tables of text: the same ones for the terminal, the HTML page and the dataset card.

No counting here, and no HTML.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sharding.files import size_text
from sharding.report import Report
from sharding.reporting.chunk_list import ranges
from sharding.reporting.word_counts import WordGroup


@dataclass(frozen=True)
class ReportTable:
    """A table with its title.

    name: what others pick it by. weights: a number for each row, drawn as a bar in HTML.
    """

    name: str
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    weights: tuple[float, ...] = ()
    total: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def report_tables(report: Report) -> list[ReportTable]:
    """Return the tables that have rows, in reading order."""
    tables = [
        _datasets(report),
        _periods(report),
        *(_words(group) for group in report.words),
        _custom(report),
        _models(report),
        _sources(report),
        _drops(report),
        _waiting(report),
        _formats(report),
        *_histograms(report),
        *_duplicates(report),
        _chunks(report),
    ]
    return [table for table in tables if table.rows]


def _datasets(report: Report) -> ReportTable:
    sets = report.datasets
    has_held_out = any(dataset.num_held_out for dataset in sets)
    has_repeats = any(dataset.num_trained_per_epoch != dataset.num_images for dataset in sets)
    columns: list[tuple[str, list[str], str]] = [
        ("dataset name", [dataset.name for dataset in sets], "Total"),
        ("total images", *_numbers([dataset.num_images for dataset in sets])),
        ("total chunk", *_numbers([dataset.num_chunks for dataset in sets])),
        ("in the last", [f"{dataset.num_in_last:,}" for dataset in sets], ""),
    ]
    if has_held_out:
        columns.append(("held out", *_numbers([dataset.num_held_out for dataset in sets])))
    if has_repeats:
        columns.append(("per epoch", *_numbers([dataset.num_trained_per_epoch for dataset in sets])))
    num_bytes = [dataset.num_bytes for dataset in sets]
    columns += [
        ("packed images", *_numbers([dataset.num_packed_images for dataset in sets])),
        ("packed chunk", *_numbers([dataset.num_packed_chunks for dataset in sets])),
        ("size", [size_text(count) for count in num_bytes], size_text(sum(num_bytes))),
    ]
    combined = report.num_combined_chunks
    return ReportTable(
        name="datasets",
        title="Datasets",
        head=tuple(head for head, _, _ in columns),
        rows=tuple(zip(*(cells for _, cells, _ in columns), strict=True)),
        weights=tuple(dataset.num_images for dataset in sets),
        total=tuple(total for _, _, total in columns),
        notes=(f"and {combined:,} combined chunks of the same images",) if combined else (),
    )


def _numbers(values: Sequence[int]) -> tuple[list[str], str]:
    return [f"{value:,}" for value in values], f"{sum(values):,}"


def _periods(report: Report) -> ReportTable:
    rows = [
        (count.name or "(none)", _years(count.first_year, count.last_year), f"{count.num_images:,}")
        for count in report.periods
    ]
    weights = tuple(count.num_images for count in report.periods)
    has_any = any(count.name for count in report.periods)
    return ReportTable("periods", "Dates", ("period", "date", "images"), tuple(rows) if has_any else (), weights)


def _years(first: int, last: int) -> str:
    return "" if not first else str(first) if first == last else f"{first} to {last}"


def _words(group: WordGroup) -> ReportTable:
    thresholds = [word.threshold for word in group.words if word.threshold is not None]
    digits = max([2, *(len(f"{threshold:g}".partition(".")[2]) for threshold in thresholds)])
    rows = [
        (
            "rest of them" if word.threshold is None else f"{word.threshold:.{digits}f}",
            word.word,
            f"{word.num_images:,}",
        )
        for word in group.words
    ]
    weights = [word.num_images for word in group.words]
    if group.num_without:
        rows.append(("", f"no {group.name} tag", f"{group.num_without:,}"))
        weights.append(group.num_without)
    first = 0 if thresholds else 1
    score = "score at least" if group.comparison == ">=" else "score greater than"
    return ReportTable(
        name=f"words of {group.name}",
        title=f"{group.name.capitalize()} tags",
        head=(score, f"{group.name} tag", "count")[first:],
        rows=tuple(row[first:] for row in rows),
        weights=tuple(weights),
        notes=(f"model: {group.model}",) if group.model else (),
    )


def _custom(report: Report) -> ReportTable:
    return ReportTable("custom", "Custom tags", ("source", "custom tag"), report.custom_words)


def _models(report: Report) -> ReportTable:
    rows = [
        (count.name, count.model, count.revision[:12], f"{count.num_images:,}", f"{count.num_failed:,}")
        for count in report.models
    ]
    return ReportTable("models", "Models", ("name", "model", "revision", "images", "failed"), tuple(rows))


def _sources(report: Report) -> ReportTable:
    rows = [
        (source.name, f"{source.num_files:,}", size_text(source.num_bytes), f"{source.num_packed:,}",
         f"{source.num_dropped:,}", f"{source.num_waiting:,}")
        for source in report.sources
    ]  # fmt: skip
    weights = tuple(source.num_files for source in report.sources)
    head = ("source", "files", "size", "packed", "dropped", "waiting")
    return ReportTable("sources", "Files by source", head, tuple(rows), weights)


def _drops(report: Report) -> ReportTable:
    rows = tuple((drop.stage, drop.reason, f"{drop.num_files:,}") for drop in report.drops)
    weights = tuple(drop.num_files for drop in report.drops)
    return ReportTable("drops", "Dropped files", ("dropped by", "reason", "files"), rows, weights)


def _waiting(report: Report) -> ReportTable:
    rows = tuple((stage.stage, f"{stage.num_files:,}") for stage in report.waiting)
    weights = tuple(stage.num_files for stage in report.waiting)
    return ReportTable("waiting", "Waiting files", ("waiting for", "files"), rows, weights)


def _formats(report: Report) -> ReportTable:
    rows = [
        (count.name, f"{count.num_files:,}", size_text(count.num_bytes), f"{count.num_pass_through:,}")
        for count in report.formats
    ]
    pixels = report.pixels
    note = f"pixels: smallest {pixels.smallest:,}, median {pixels.median:,}, largest {pixels.largest:,}"
    weights = tuple(count.num_files for count in report.formats)
    head = ("format", "kept files", "size", "unchanged")
    return ReportTable("formats", "Formats of kept files", head, tuple(rows), weights, notes=(note,))


def _histograms(report: Report) -> list[ReportTable]:
    return [
        ReportTable(
            name=f"histogram of {histogram.name}",
            title=f"{histogram.name.capitalize()} of kept files",
            head=(histogram.name, "files"),
            rows=tuple((label, f"{count:,}") for label, count in histogram.bins if count),
            weights=tuple(count for _, count in histogram.bins if count),
        )
        for histogram in report.histograms
    ]


def _duplicates(report: Report) -> list[ReportTable]:
    found = report.duplicates
    note = f"{found.num_members:,} pictures in {found.num_groups:,} groups, the largest of {found.largest:,}"
    tables = (
        ("duplicate groups", "Duplicate groups by size", ("pictures in group", "groups"), found.by_size),
        ("duplicate distances", "Dropped duplicates by distance", ("bits to the keeper", "files"), found.by_distance),
        ("duplicate kinds", "Dropped duplicates by kind", ("kind", "pictures"), found.by_kind),
        ("duplicate rules", "Why the keeper stayed", ("rule", "dropped pictures"), found.by_rule),
    )
    return [
        ReportTable(
            name=name,
            title=title,
            head=head,
            rows=tuple((str(value), f"{count:,}") for value, count in counts),
            weights=tuple(count for _, count in counts),
            notes=(note,) if name == "duplicate groups" else (),
        )
        for name, title, head, counts in tables
    ]


def _chunks(report: Report) -> ReportTable:
    rows = tuple((span, f"{count:,}", f"{images:,}", state) for span, count, images, state in ranges(report.chunks))
    return ReportTable("chunks", "Chunks", ("chunks", "number", "images in each", "state"), rows)


# --- as text and as Markdown ---


def table_as_text(table: ReportTable) -> list[str]:
    """Return the lines of a table in columns; numbers stand right."""
    rows = [table.head, *table.rows, *([table.total] if table.total else [])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.head))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if is_number(cell) else cell.ljust(width) for cell, width in zip(row, widths, strict=True)
        ]
        return "  ".join(cells).rstrip()

    return [*(line(row) for row in rows), *table.notes]


def table_as_markdown(table: ReportTable) -> list[str]:
    """Return the lines of a table in Markdown; the total is bold."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(_escape(cell) for cell in cells) + " |"

    rules = [
        "---:" if all(is_number(row[column]) for row in table.rows) else "---" for column in range(len(table.head))
    ]
    bold = [f"**{cell}**" if cell else "" for cell in table.total]
    lines = [line(table.head), "|" + "|".join(rules) + "|", *(line(row) for row in table.rows)]
    lines += ["| " + " | ".join(bold) + " |"] if bold else []
    return lines + (["", *table.notes] if table.notes else [])


def _escape(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def is_number(cell: str) -> bool:
    """Tell whether a cell is a number, which stands right."""
    return cell[:1].isdigit() and not any(letter in cell for letter in ":–") and " to " not in cell
