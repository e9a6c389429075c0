"""`captioning stats`: its options, and what it writes and prints."""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from captioning.config import CaptioningConfig
    from sharding.schema import Workspace


@dataclass(frozen=True)
class Printed:
    """What a command prints."""

    text: str

    def summary(self) -> str:
        return self.text


def run_stats(
    options: argparse.Namespace, config: "CaptioningConfig", workspace: "Workspace", *, policy: str
) -> Printed:
    """Answer `stats`, or with --what-if what other edges would change. Raises ConfigError for wrong options."""
    from sharding.config import ConfigError

    if options.top < 1 or options.samples < 0:
        raise ConfigError(f"--top must be at least 1 and --samples 0, got {options.top} and {options.samples}")
    if options.html and options.html.is_dir():
        raise ConfigError(
            f"--html {options.html}: is a folder; name a file in it, such as {options.html / 'stats.html'}"
        )
    if options.png and options.png.exists() and not options.png.is_dir():
        raise ConfigError(f"--png {options.png}: is a file; name a folder, which is made if it is not there")
    return (_what_if if options.what_if else _stats)(options, config, workspace, policy)


def _stats(options: argparse.Namespace, config: "CaptioningConfig", workspace: "Workspace", policy: str) -> Printed:
    from captioning.histogram_drawing import draw_histogram
    from captioning.stats import stats
    from captioning.stats_page import stats_page
    from sharding.files import write_bytes

    report = stats(config, workspace, policy=policy, top=options.top, count_tokens=options.tokens)
    if options.html:
        write_bytes(options.html, stats_page(report, name=config.name).encode())
    for histogram in report.histograms if options.png else ():
        write_bytes(options.png / f"{histogram.model}.png", draw_histogram(histogram))
    return Printed(_json(asdict(report)) if options.json else report.summary())


def _what_if(options: argparse.Namespace, config: "CaptioningConfig", workspace: "Workspace", policy: str) -> Printed:
    from captioning.stats_page import what_if_page
    from captioning.thumbnails import make_thumbnails
    from captioning.what_if import parse_edges, what_if
    from sharding.config import ConfigError
    from sharding.files import write_bytes

    if options.png:
        raise ConfigError("--png draws the scores of `stats`; with --what-if pictures are on the page of --html")
    edges = parse_edges(options.what_if)
    report = what_if(config, workspace, edges, policy=policy, num_samples=options.samples)
    if options.html:
        near = [it.key for table in report.tables for edge in table.edges for it in (*edge.passing, *edge.failing)]
        page = what_if_page(report, make_thumbnails(config, workspace, near), name=config.name)
        write_bytes(options.html, page.encode())
    return Printed(_json(asdict(report)) if options.json else report.summary())


def _json(values: dict[str, object]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)


def add_stats_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `stats` but those that all commands have."""
    parser.add_argument("--top", type=int, default=20, metavar="N", help="words of a group, and pairs (default: 20)")
    parser.add_argument("--tokens", action="store_true", help="count CLIP tokens, too, by the policy's tokenizer")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one page with everything in it")
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="write a histogram of each scorer")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--what-if", action="append", metavar="WORD=EDGE",
        help="say what another edge of a tier, as very_aesthetic=0.82, would change; repeatable",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, default=6, metavar="N", help="pictures on each side of a new edge")
