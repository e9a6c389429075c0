"""What was found, as one HTML page with the pictures in it; needs no network and runs no script."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from training.dreambooth.doctor.examination import Examination
from training.dreambooth.doctor.pictures import Picture
from training.dreambooth.doctor.report import summary
from training.dreambooth.doctor.rules import SEVERITIES, Finding, Rules

_STYLE = """
:root{color-scheme:light dark;--fail:#c62828;--warn:#b26a00;--note:#1565c0;--line:#8884}
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:1200px;padding:0 1rem}
h1{font-size:1.4rem}h2{font-size:1.15rem;margin-top:2rem;border-bottom:1px solid var(--line)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(340px,1fr));gap:12px}
.card{display:flex;gap:12px;border:1px solid var(--line);border-radius:6px;padding:10px;border-left:5px solid #8888}
.card img{max-width:110px;max-height:150px;object-fit:contain;align-self:flex-start}
.card.fail{border-left-color:var(--fail)}.card.warn{border-left-color:var(--warn)}.card.note{border-left-color:var(--note)}
.gone{width:110px;height:80px;border:1px dashed;text-align:center;flex:none;font-size:12px;padding-top:1.5rem}
ul{margin:.2rem 0;padding-left:1.1rem}li{margin-bottom:.35rem;overflow-wrap:anywhere}small{opacity:.75}
b.fail{color:var(--fail)}b.warn{color:var(--warn)}b.note{color:var(--note)}
.good{display:flex;flex-wrap:wrap;gap:6px}.good img{height:90px}
"""


def render_page(examination: Examination) -> str:
    """Return the page. Same examination, same text."""
    sections = []
    for patient in examination.patients:
        own = [finding for finding in examination.findings if finding.concept == patient.name]
        sections.append(_section(patient.name, patient.pictures, own, examination.rules))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        f"<title>Doctor</title>\n<style>{_STYLE}</style></head>\n<body>\n"
        f"<h1>{escape(summary(examination))}</h1>\n" + "\n".join(sections) + "\n</body></html>\n"
    )


def _section(name: str, pictures: Sequence[Picture], findings: Sequence[Finding], rules: Rules) -> str:
    of_concept = [finding for finding in findings if finding.file is None]
    by_file: dict[Path, list[Finding]] = {}
    for finding in findings:
        if finding.file is not None:
            by_file.setdefault(finding.file, []).append(finding)
    faulty = sorted((one for one in pictures if one.path in by_file), key=lambda one: _worst(by_file[one.path]))
    cards = "".join(_card(picture, by_file[picture.path], rules) for picture in faulty)
    good = "".join(_image(picture) for picture in pictures if picture.path not in by_file)
    return (
        f"<h2>{escape(name)}: {len(pictures):,} pictures</h2>{_list(of_concept, rules)}"
        f'<div class="cards">{cards}</div>' + (f'<h3>Nothing found</h3><div class="good">{good}</div>' if good else "")
    )


def _worst(findings: Sequence[Finding]) -> int:
    return min(SEVERITIES.index(finding.severity) for finding in findings)


def _card(picture: Picture, findings: Sequence[Finding], rules: Rules) -> str:
    worst = SEVERITIES[_worst(findings)]
    return (
        f'<div class="card {worst}">{_image(picture)}<div><strong>{escape(picture.path.name)}</strong>'
        f"{_list(findings, rules)}</div></div>"
    )


def _image(picture: Picture) -> str:
    if picture.measured is None:
        return '<div class="gone">no picture</div>'
    data = base64.b64encode(picture.measured.thumbnail).decode()
    return f'<img alt="" title="{escape(picture.path.name)}" src="data:image/webp;base64,{data}">'


def _list(findings: Sequence[Finding], rules: Rules) -> str:
    items = "".join(_item(finding, rules) for finding in findings)
    return f"<ul>{items}</ul>" if items else ""


def _item(finding: Finding, rules: Rules) -> str:
    rule = rules.rules[finding.rule]
    side = "at least" if rule.below else "at most"
    advice = f"{rule.advice}." if rule.advice else ""
    return (
        f'<li><b class="{finding.severity}">{escape(finding.rule.replace("_", " "))}</b> {escape(finding.text)} '
        f"<small>({finding.number:.4g}, {side} {finding.limit:g}). {escape(advice)} "
        f"<i>Wiki: {escape(rule.wiki)}</i></small></li>"
    )
