"""Write a Hugging Face dataset card (README.md) from a report's numbers: `python -m sharding card DATASET.toml`.

The YAML at its head names the shards, so that `datasets.load_dataset` finds each dataset, and the held-out chunks as
the split `validation`. Paths are relative to the workspace, which is what one uploads: the card and `chunks/`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharding.chunk import HELD_OUT_NAME
from sharding.files import size_text, write_bytes
from sharding.report import Report
from sharding.reporting.tables import ReportTable, report_tables, table_as_markdown

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"),
          (10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M"), (1_000_000_000, "100M<n<1B"))  # fmt: skip
_SECTIONS = {
    "## Datasets": ("datasets", "sources", "chunks"),
    "## Dates": ("periods",),
    "## Tags": ("words of", "custom"),
    "## Models": ("models",),
    "## Pictures": ("formats", "histogram of"),
    "## What was left out": ("drops", "duplicate groups"),
}


@dataclass(frozen=True)
class CardFacts:
    """What the numbers do not say. license: a Hugging Face identifier; `other` wants a name and a link."""

    license: str = "unknown"
    license_name: str = ""
    license_link: str = ""
    homepage: str = ""

    def __post_init__(self) -> None:
        if self.license == "other" and not self.license_name:
            raise ValueError("--license other: give its name with --license-name, and --license-link if there is one")
        if self.license != "other" and (self.license_name or self.license_link):
            raise ValueError(f"--license-name and --license-link belong to --license other, not to {self.license!r}")


@dataclass(frozen=True)
class CardReport:
    """What `write_card` has written."""

    path: Path
    num_images: int
    configs: tuple[str, ...]

    def summary(self) -> str:
        return f"{self.path}: {self.num_images:,} images, {len(self.configs)} configs: {', '.join(self.configs)}"


def write_card(report: Report, path: Path, facts: CardFacts) -> CardReport:
    """Write the card, replacing what is there.

    Raises ValueError when no chunk is packed: the card names files.
    """
    write_bytes(path, render_card(report, facts).encode())
    configs = tuple(config["config_name"] for config in _configs(report))
    return CardReport(path, sum(dataset.num_packed_images for dataset in report.datasets), configs)


def render_card(report: Report, facts: CardFacts) -> str:
    """Return the card's text. Same report and facts, same text."""
    if not any(dataset.num_packed_chunks for dataset in report.datasets):
        raise ValueError(f"{report.name}: no chunk is packed, so a card has no files to name; run `pack` first")
    tables = report_tables(report)
    lines = ["---", *_yaml(_front_matter(report, facts)), "---", "", f"# {report.name}", "", *_opening(report), ""]
    for title, prefixes in _SECTIONS.items():
        chosen = [table for prefix in prefixes for table in tables if table.name.startswith(prefix)]
        if chosen:
            lines += [title, ""]
            for table in chosen:
                lines += [*_titled(table, title), *table_as_markdown(table), ""]
    return "\n".join(lines + _how_to_read(report))


def _titled(table: ReportTable, section: str) -> list[str]:
    return [] if section.endswith(f" {table.title}") else [f"### {table.title}", ""]


def _opening(report: Report) -> list[str]:
    num_packed = sum(dataset.num_packed_images for dataset in report.datasets)
    num_bytes = sum(dataset.num_bytes for dataset in report.datasets)
    num_chunks = sum(dataset.num_packed_chunks for dataset in report.datasets)
    lines = [
        f"{num_packed:,} images with captions in {num_chunks:,} chunks of webdataset tars ({size_text(num_bytes)}).",
        "",
        f"Of what was there: {report.account}.",
    ]
    for group in report.words:
        if group.model and group.num_without:
            lines += ["", f"{group.num_without:,} images have no {group.name} tag: their score is missing."]
    return lines


def _front_matter(report: Report, facts: CardFacts) -> dict[str, Any]:
    num_images = sum(dataset.num_packed_images for dataset in report.datasets)
    size = next((name for limit, name in _SIZES if num_images < limit), "1B<n<10B")
    optional = {
        "license_name": facts.license_name, "license_link": facts.license_link, "homepage": facts.homepage,
    }  # fmt: skip
    return {
        "pretty_name": report.name,
        "license": facts.license,
        **{name: value for name, value in optional.items() if value},
        "task_categories": ["text-to-image"],
        "size_categories": [size],
        "tags": ["webdataset"],
        "configs": _configs(report),
    }


def _configs(report: Report) -> list[dict[str, Any]]:
    """One config with everything, and one per dataset; only what is packed, and no shard twice (combined chunks)."""
    packed = [dataset.name for dataset in report.datasets if dataset.num_packed_chunks]
    held_out = {chunk.name.split("/")[0] for chunk in report.chunks if chunk.is_held_out and chunk.num_packed}
    configs = [_config("default", packed, held_out) | {"default": True}]
    return configs + [_config(name, [name], held_out) for name in packed if name != "default"]


def _config(name: str, datasets: Sequence[str], held_out: set[str]) -> dict[str, Any]:
    files = [{"split": "train", "path": [f"chunks/{dataset}/[0-9]*/shard-*.tar" for dataset in datasets]}]
    aside = [f"chunks/{dataset}/{HELD_OUT_NAME}/shard-*.tar" for dataset in datasets if dataset in held_out]
    return {"config_name": name, "data_files": files + ([{"split": "validation", "path": aside}] if aside else [])}


def _yaml(values: dict[str, Any], indent: str = "") -> list[str]:
    """Return YAML lines. Strings are written as JSON, which is YAML, too: `no` and `1e-5` stay strings."""
    lines = []
    for name, value in values.items():
        if isinstance(value, list):
            lines.append(f"{indent}{name}:")
            for item in value:
                inner = _yaml(item, indent + "  ") if isinstance(item, dict) else [f"{indent}  {_scalar(item)}"]
                lines += [f"{indent}- {inner[0][len(indent) + 2 :]}", *inner[1:]]
        else:
            lines.append(f"{indent}{name}: {_scalar(value)}")
    return lines


def _scalar(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _how_to_read(report: Report) -> list[str]:
    first = next(dataset.name for dataset in report.datasets if dataset.num_packed_chunks)
    return [
        "## How to read it",
        "",
        "Beside `README.md` lies `chunks/`: a folder per chunk with its tars, `index-*.parquet` (a row per sample with",
        "byte offsets, size, caption and tag groups) and `chunk.json`. A sample is `KEY.jpg` or `KEY.png`, `KEY.json`,",
        "`KEY.txt` (the caption).",
        "",
        "```python",
        "from datasets import load_dataset",
        "",
        f'dataset = load_dataset("FOLDER", {json.dumps(first, ensure_ascii=False)}, split="train", streaming=True)',
        "```",
        "",
    ]
