"""What was found, as a table for a terminal and as a JSON object."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from training.dreambooth.doctor.concept_checks import epochs_for, name_of
from training.dreambooth.doctor.examination import Examination
from training.dreambooth.doctor.patients import Patient
from training.dreambooth.doctor.pictures import Picture
from training.dreambooth.doctor.rules import SEVERITIES, Finding, Rules


def text_report(examination: Examination) -> str:
    """Return the findings, worst first, as columns, and a last line with counts."""
    rows: list[tuple[str, ...]] = [("severity", "rule", "concept", "file", "number", "limit", "what")]
    rows += [_row(finding, examination.rules) for finding in examination.findings]
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    lines = []
    if examination.findings:
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[6]]) for row in rows
        ]
        lines.append("")
    return "\n".join([*lines, *map(_concept_line, examination.patients), summary(examination)]) + "\n"


def summary(examination: Examination) -> str:
    """Return one line: how many pictures and findings."""
    pictures = sum(len(patient.pictures) for patient in examination.patients)
    counts = ", ".join(f"{examination.count(severity)} {severity}" for severity in SEVERITIES)
    return f"{len(examination.patients)} concepts, {pictures:,} pictures: {counts}"


def json_report(examination: Examination) -> dict[str, Any]:
    """Return all numbers, also the good ones."""
    return {
        "counts": {severity: examination.count(severity) for severity in SEVERITIES},
        "findings": [
            {**asdict(finding), "file": str(finding.file or ""), "wiki": examination.rules.rules[finding.rule].wiki}
            for finding in examination.findings
        ],
        "concepts": [_concept(patient) for patient in examination.patients],
    }


def _row(finding: Finding, rules: Rules) -> tuple[str, ...]:
    rule = rules.rules[finding.rule]
    what = f"{finding.text}; {rule.advice}" if rule.advice else finding.text
    numbers = (f"{finding.number:.4g}", ("≥ " if rule.below else "≤ ") + f"{finding.limit:g}")
    return (finding.severity, finding.rule, finding.concept, finding.file.name if finding.file else "", *numbers, what)


def _concept_line(patient: Patient) -> str:
    count = len(patient.pictures)
    return f"{patient.name}: {count:,} pictures, repeats {patient.concept.repeats}, epochs {epochs_for(max(count, 1))}"


def _concept(patient: Patient) -> dict[str, Any]:
    return {
        "name": patient.name,
        "called": name_of(patient),
        "folder": str(patient.concept.folder),
        "repeats": patient.concept.repeats,
        "epochs": epochs_for(max(len(patient.pictures), 1)),
        "pictures": [_picture(picture) for picture in patient.pictures],
    }


def _picture(picture: Picture) -> dict[str, Any]:
    tags: Sequence[str] = picture.caption.tags if picture.caption else ()
    result: dict[str, Any] = {"file": str(picture.path), "tags": list(tags)}
    measured = picture.measured
    if measured is None:
        return {**result, "error": picture.error}
    return {
        **result,
        "width": measured.facts.width,
        "height": measured.facts.height,
        "bucket": measured.bucket,
        "upscale": measured.upscale,
        "crop_loss": measured.crop_loss,
        **asdict(measured.numbers),
        **asdict(measured.traces),
        "bars": asdict(measured.bars),
        "text": [asdict(box) for box in measured.text],
        "figures": None if measured.boxes is None else [asdict(box) for box in measured.boxes],
    }
