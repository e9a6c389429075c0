"""Stats and what-ifs as one HTML page that needs nothing else: pictures are inside, there is no script, no network.

Every text is escaped. No counting here: numbers are the reports'.
"""

import base64
from collections.abc import Collection, Mapping, Sequence
from html import escape

from captioning.histogram_drawing import draw_histogram
from captioning.stats import StatsReport
from captioning.tag_counts import LENGTHS_HEAD
from captioning.text_table import number_text
from captioning.thumbnails import Thumbnail
from captioning.what_if_report import NearPicture, TableChange, WhatIfReport

STYLE = """
:root { --ink: #1d2330; --soft: #5b6475; --paper: #f6f7f9; --card: #fff; --line: #dfe3ea; --bar: #4a7dd6 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #9aa4b5; --paper: #13161c; --card: #1b2028;
  --line: #2d3440; --bar: #6d9cf0 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 90rem; font: 15px/1.45 system-ui, sans-serif; color: var(--ink);
  background: var(--paper) }
h1 { margin: 0; font-size: 1.6rem } h2 { margin: 0 0 .5rem; font-size: 1.05rem }
h3 { margin: 1rem 0 .4rem; font-size: .95rem } header p { margin: .2rem 0 1rem; color: var(--soft) }
main { columns: 26rem; column-gap: .75rem }
section { break-inside: avoid; margin: 0 0 .75rem; padding: .8rem 1rem; background: var(--card);
  border: 1px solid var(--line); border-radius: .5rem }
.wide { column-span: all } .scroll { overflow: auto; max-height: 60rem }
table { border-collapse: collapse; width: 100%; font-size: .9rem }
th, td { padding: .2rem .6rem .2rem 0; text-align: left; border-bottom: 1px solid var(--line) }
td { max-width: 16rem; overflow-wrap: break-word } td.rule { color: var(--soft); white-space: nowrap }
th { color: var(--soft); font-weight: 500; white-space: nowrap } .changed { font-weight: 600 }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td.bar { width: 20%; min-width: 2.5rem; padding-right: 0 } .bar svg { display: block; fill: var(--bar) }
.chart { display: block; width: 100%; height: auto; border-radius: .3rem } .charts { display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fill, minmax(min(30rem, 100%), 1fr)); align-items: end }
@media (prefers-color-scheme: dark) { .chart { filter: invert(1) hue-rotate(180deg); mix-blend-mode: screen } }
.pictures { display: flex; flex-wrap: wrap; gap: .6rem } figure { margin: 0; width: 12rem }
figcaption b { color: var(--ink) }
figure img { display: block; max-width: 100%; height: auto; border-radius: .3rem; background: var(--line) }
figcaption { margin-top: .2rem; color: var(--soft); font-size: .75rem; overflow-wrap: anywhere }
.gone { padding: 3rem 0; text-align: center; color: var(--soft); background: var(--line); border-radius: .3rem }
@media (max-width: 32rem) { body { padding: .6rem } figure { width: calc(50% - .3rem) } }
"""


def stats_page(report: StatsReport, *, name: str) -> str:
    """Return the page of a dataset's stats."""
    count = f"{report.num_captions:,}"
    sections = []
    for group, lines in report.tables.items():
        rows = [(it.rule, it.word, f"{it.count:,}", report.share(it.count)) for it in lines]
        sections.append(_section(group, ("", "tag", "count", "share"), rows, [it.count for it in lines], (2, 3)))
    for group, tags in report.tags.items():
        rows3 = [(it.tag, f"{it.count:,}", report.share(it.count)) for it in tags]
        title = f"Most frequent: {group}"
        sections.append(_section(title, ("tag", "count", "share"), rows3, [it.count for it in tags], (1, 2)))
    if report.pairs:
        pairs = [(it.left, it.right, f"{it.count:,}") for it in report.pairs]
        sections.append(_section("Together", ("word", "and", "count"), pairs, [it.count for it in report.pairs], (2,)))
    if report.lengths:
        cells = [it.cells() for it in report.lengths]
        sections.append(_section("Lengths of captions", LENGTHS_HEAD, cells, [], range(1, 6)))
    if report.tokens:
        tokens = [(it.word, f"{it.count:,}", report.share(it.count)) for it in report.tokens]
        head = ("CLIP tokens", "count", "share")
        sections.append(_section("Token windows", head, tokens, [it.count for it in report.tokens], (1, 2)))
    statuses = [(model, it, f"{n:,}") for model, counts in report.statuses.items() for it, n in counts.items()]
    sections.append(_section("Annotations", ("model", "status", "rows"), statuses, [], (2,)))
    charts = "".join(
        f'<img class="chart" alt="histogram of {escape(it.model)}" src="{_data("png", draw_histogram(it))}">'
        for it in report.histograms
    )
    chart_section = f'<section class="wide"><h2>Scores</h2><div class="charts">{charts}</div></section>'
    note = f"{count} captions" + (f", not current: {report.note}" if report.note else "")
    return _page(f"{name}, policy {report.policy}", note, [chart_section if charts else "", *sections])


def what_if_page(report: WhatIfReport, thumbnails: Mapping[str, Thumbnail], *, name: str) -> str:
    """Return the page of new edges, with pictures on both sides of each."""
    sections = []
    for table in report.tables:
        sections.append(_words_section(table))
        for edge in table.edges:
            move = escape(f"{edge.word}: {number_text(edge.before)} → {number_text(edge.after)}")
            sections.append(
                f'<section class="wide"><h2>{move}</h2>'
                f"<h3>just above</h3>{_figures(edge.passing, thumbnails)}"
                f"<h3>just below</h3>{_figures(edge.failing, thumbnails)}</section>"
            )
    changed = ", ".join(f"{table.num_changed:,} get another {table.group} word" for table in report.tables)
    note = f"What if: of {report.num_pictures:,} pictures {changed}. Nothing was changed."
    return _page(f"{name}, policy {report.policy}", note, sections)


def _words_section(table: TableChange) -> str:
    rows = [
        (
            it.word,
            *(
                "" if edge is None else f"{table.comparison} {number_text(edge)}"
                for edge in (it.edge_before, it.edge_after)
            ),
            *it.counts(),
        )
        for it in table.words
    ]
    head = ("tag", "edge", "new edge", "count", "new count", "change")
    counts = [it.count_after for it in table.words]
    changed = {place for place, it in enumerate(table.words) if it.count_before != it.count_after}
    return _section(f"{table.group} by {table.model}", head, rows, counts, range(1, 6), marked=changed, is_wide=True)


def _figures(pictures: Sequence[NearPicture], thumbnails: Mapping[str, Thumbnail]) -> str:
    if not pictures:
        return "<p>none</p>"
    figures = []
    for it in pictures:
        *folders, name = it.path.split("/")
        path = "/".join([it.source, *(["…"] if len(folders) > 1 else []), *folders[-1:], name])
        text = f"<b>{number_text(it.score)}</b> {escape(it.words())}<br>{escape(path)}"
        small = thumbnails.get(it.key)
        picture = (
            f'<img width="{small.width}" height="{small.height}" alt="" src="{_data("webp", small.webp)}">'
            if small
            else '<div class="gone">no picture</div>'
        )
        title = escape(f"{it.key} {it.source}/{it.path}")
        figures.append(f'<figure title="{title}">{picture}<figcaption>{text}</figcaption></figure>')
    return f'<div class="pictures">{"".join(figures)}</div>'


def _section(
    title: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    weights: Sequence[int],
    numbers: Collection[int],
    *,
    marked: Collection[int] = (),
    is_wide: bool = False,
) -> str:
    """numbers: columns that stand right. weights: lengths of bars. marked: rows that stand out."""
    sides = [
        ' class="n"' if column in numbers else ' class="rule"' if not text else "" for column, text in enumerate(head)
    ]
    most = max(weights, default=0)
    heads = "".join(f"<th{side}>{escape(text)}</th>" for side, text in zip(sides, head, strict=True))
    lines = []
    for place, row in enumerate(rows):
        cells = "".join(f"<td{side}>{escape(text)}</td>" for side, text in zip(sides, row, strict=True))
        kind = ' class="changed"' if place in marked else ""
        lines.append(f"<tr{kind}>{cells}{_bar(weights[place] / most) if most else ''}</tr>")
    kind = ' class="wide"' if is_wide else ""
    return (
        f'<section{kind}><h2>{escape(title)}</h2><div class="scroll"><table><thead><tr>{heads}'
        f"{'<th></th>' if most else ''}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></section>"
    )


def _bar(fraction: float) -> str:
    return (
        '<td class="bar"><svg width="100%" height="10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect width="{fraction:.1%}" height="10" rx="2"/></svg></td>'
    )


def _data(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _page(title: str, note: str, sections: Sequence[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1><p>{escape(note)}</p></header>\n<main>"
        + "\n".join(part for part in sections if part)
        + "</main>\n</body></html>\n"
    )
