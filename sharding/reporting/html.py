"""A report as one HTML page that needs nothing else: styles and thumbnails are inside, there is no script.

Reads well on a phone and on paper, light and dark. Every text is escaped; the page allows itself no network. No
counting here: numbers are the `Report`'s.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from pathlib import Path

from sharding.config import DatasetConfig
from sharding.files import size_text, write_bytes
from sharding.report import Report
from sharding.reporting.census import dataset_order, place_in
from sharding.reporting.chunk_list import ChunkCount
from sharding.reporting.duplicate_groups import GroupSample
from sharding.reporting.sample_pictures import Thumbnail, make_thumbnails, pick_keys
from sharding.reporting.style import STYLE
from sharding.reporting.tables import ReportTable, is_number, report_tables
from sharding.schema import Workspace

MAX_PICTURE_BYTES = 3 << 20
"""Of all thumbnails on a page, before Base64 adds a third."""


@dataclass(frozen=True)
class Pictures:
    """What a page shows: `samples` are keys by dataset."""

    samples: Mapping[str, Sequence[str]] = field(default_factory=dict)
    thumbnails: Mapping[str, Thumbnail] = field(default_factory=dict)


def write_page(
    config: DatasetConfig, workspace: Workspace, report: Report, path: Path, *, num_samples: int, seed: int = 0
) -> None:
    """Write the page with `num_samples` pictures of each dataset and of the duplicate groups; 0 shows no picture."""
    picked = pick_keys(workspace, num_per_dataset=num_samples, seed=seed)
    order = dataset_order(config)
    samples = {name: picked[name] for name in sorted(picked, key=lambda name: (place_in(order, name), name))}
    keys = [key for keys in samples.values() for key in keys]
    if num_samples:
        keys += [member.key for group in report.duplicates.sample for member in group.members]
    thumbnails = make_thumbnails(config, workspace, keys, max_bytes=MAX_PICTURE_BYTES)
    write_bytes(path, render_html(report, Pictures(samples, thumbnails)).encode())


def render_html(report: Report, pictures: Pictures | None = None) -> str:
    """Return the page. Same report and pictures, same text."""
    pictures = pictures or Pictures()
    body = [
        f"<header><h1>{escape(report.name)}</h1>",
        f'<p class="account{"" if report.adds_up else " wrong"}">{escape(report.account)}</p></header>',
        _tiles(report),
        *_warnings(report),
        '<main class="grid">',
        *(_section(table) for table in report_tables(report) if table.name != "chunks"),
        "</main>",
        _samples(pictures),
        _groups(report.duplicates.sample, pictures.thumbnails),
        _chunks(report.chunks),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(report.name)}: report</title>\n<style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body></html>\n"
    )


def _tiles(report: Report) -> str:
    num_bytes = sum(dataset.num_bytes for dataset in report.datasets)
    tiles = [
        ("images planned", f"{report.num_images:,}"),
        ("chunks", f"{report.num_chunks:,}"),
        ("files seen", f"{report.num_files:,}"),
        ("files dropped", f"{report.num_dropped:,}"),
        ("packed", size_text(num_bytes)),
    ]
    cells = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in tiles)
    return f'<div class="tiles">{cells}</div>'


def _warnings(report: Report) -> list[str]:
    lines = []
    if not report.adds_up:
        lines.append("The sums do not add up: this is a mistake of the program, please report it.")
    if report.num_unlisted_packed:
        lines.append(f"{report.num_unlisted_packed:,} packed samples come from files that are not listed now.")
    lines += [
        f"{group.num_without:,} images have no {group.name} tag."
        for group in report.words
        if group.model and group.num_without
    ]
    return [f'<p class="warning">{escape(line)}</p>' for line in lines]


def _section(table: ReportTable) -> str:
    notes = "".join(f"<p>{escape(note)}</p>" for note in table.notes)
    wide = ' class="wide"' if len(table.head) > 4 else ""
    return f"<section{wide}><h2>{escape(table.title)}</h2>{_table(table)}{notes}</section>"


def _table(table: ReportTable) -> str:
    most = max(table.weights, default=0)
    head = "".join(f"<th{_side(table, place)}>{escape(name)}</th>" for place, name in enumerate(table.head))
    lines = []
    for number, row in enumerate(table.rows):
        cells = "".join(f"<td{_side(table, place)}>{escape(cell)}</td>" for place, cell in enumerate(row))
        missing = ' class="missing"' if any(cell.startswith("no ") for cell in row[:2]) else ""
        lines.append(f"<tr{missing}>{cells}{_bar(table.weights[number], most) if most else ''}</tr>")
    total = "".join(f"<td{_side(table, place)}>{escape(cell)}</td>" for place, cell in enumerate(table.total))
    foot = f"<tfoot><tr>{total}{'<td></td>' if most else ''}</tr></tfoot>" if total else ""
    bar_head = '<th class="bar"></th>' if most else ""
    return (
        f'<div class="scroll"><table><thead><tr>{head}{bar_head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody>{foot}</table></div>"
    )


def _side(table: ReportTable, column: int) -> str:
    """Numbers stand right, and so do their heads."""
    return ' class="n"' if all(is_number(row[column]) for row in table.rows if row[column]) else ""


def _bar(weight: float, most: float) -> str:
    percent = f"{100 * weight / most:.1f}"
    return (
        '<td class="bar"><svg width="100%" height="10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect width="{percent}%" height="10" rx="2"/></svg></td>'
    )


def _samples(pictures: Pictures) -> str:
    blocks = []
    for name, keys in pictures.samples.items():
        shown = [pictures.thumbnails[key] for key in keys if key in pictures.thumbnails]
        if shown:
            figures = "".join(_figure(thumbnail, thumbnail.caption or thumbnail.key) for thumbnail in shown)
            blocks.append(f'<h3>{escape(name)}</h3><div class="pictures">{figures}</div>')
    return f"<section><h2>Sample pictures</h2>{''.join(blocks)}</section>" if blocks else ""


def _figure(thumbnail: Thumbnail, text: str) -> str:
    data = base64.b64encode(thumbnail.webp).decode()
    return (
        f'<figure><img loading="lazy" width="{thumbnail.width}" height="{thumbnail.height}" alt="" '
        f'title="{escape(thumbnail.key)}" src="data:image/webp;base64,{data}">'
        f"<figcaption>{escape(text)}</figcaption></figure>"
    )


def _groups(groups: Sequence[GroupSample], thumbnails: Mapping[str, Thumbnail]) -> str:
    blocks = []
    for group in groups:
        figures = []
        for member in group.members:
            distance = member.kind if member.distance is None else f"{member.distance} bits"
            role = "keeper" if member.is_keeper else f"{distance}, {member.rule}"
            facts = (
                role,
                f"{member.width}×{member.height}",
                size_text(member.num_bytes),
                f"{member.source}/{member.path}",
            )
            text = " · ".join(facts)
            if member.key in thumbnails:
                figures.append(_figure(thumbnails[member.key], text))
            else:
                figures.append(
                    f'<figure><div class="gone">no picture</div><figcaption>{escape(text)}</figcaption></figure>'
                )
        more = group.num_members - len(group.members)
        note = f"<p>and {more:,} more</p>" if more else ""
        blocks.append(f'<div class="group"><div class="pictures">{"".join(figures)}</div>{note}</div>')
    return (
        f'<section><h2>Some duplicate groups</h2><div class="groups">{"".join(blocks)}</div></section>'
        if blocks
        else ""
    )


def _chunks(chunks: Sequence[ChunkCount]) -> str:
    """All chunks, folded by dataset: a page of 12,500 chunks stays quick to open."""
    blocks = []
    for dataset, members in groupby(chunks, key=lambda chunk: chunk.name.split("/")[0]):
        listed = list(members)
        rows = "".join(
            f'<tr><td>{escape(chunk.name)}</td><td class="n">{chunk.num_images:,}</td>'
            f'<td class="n">{chunk.num_shards:,}</td><td class="n">{size_text(chunk.num_bytes)}</td>'
            f"<td>{escape(chunk.state)}</td><td>{escape(', '.join(chunk.sealed_by))}</td></tr>"
            for chunk in listed
        )
        images = sum(chunk.num_images for chunk in listed)
        blocks.append(
            f"<details><summary>{escape(dataset)}: {len(listed):,} chunks, {images:,} images</summary>"
            '<div class="scroll"><table><thead><tr><th>chunk</th><th class="n">images</th><th class="n">shards</th>'
            '<th class="n">size</th><th>state</th><th>trained by</th></tr></thead>'
            f"<tbody>{rows}</tbody></table></div></details>"
        )
    return f"<section><h2>Chunks</h2>{''.join(blocks)}</section>" if blocks else ""
