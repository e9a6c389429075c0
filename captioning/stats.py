"""Counts of the words that a policy gave, in the tables of the seed's model card, and of pictures without one.

Reads captions and the status column of annotations; nothing is written.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from captioning.config import CaptioningConfig
from sharding.config import ConfigError
from sharding.schema import Workspace
from sharding.tables import list_parts, read_part


@dataclass(frozen=True)
class WordCount:
    """One line of a table: a word, when it is given, and how many captions have it."""

    word: str
    rule: str
    count: int


@dataclass(frozen=True)
class StatsReport:
    """The tables of one policy."""

    policy: str
    num_captions: int
    tables: dict[str, list[WordCount]]
    """By group; the last line of each counts the captions without a word of the group."""
    statuses: dict[str, dict[str, int]]
    """Rows by status, for each model of the dataset that has annotations."""

    def summary(self) -> str:
        """Return the tables as text."""
        blocks = [f"policy {self.policy}: {self.num_captions:,} captions"]
        for group, lines in self.tables.items():
            rows = [
                (line.rule, line.word, f"{line.count:,}", f"{line.count / max(self.num_captions, 1):.1%}")
                for line in lines
            ]
            blocks.append(_text_table((group, "tag", "count", "share"), rows))
        by_status = [
            (model, status, f"{count:,}") for model, counts in self.statuses.items() for status, count in counts.items()
        ]
        blocks.append(_text_table(("model", "status", "rows"), by_status))
        return "\n\n".join(blocks)


def stats(config: CaptioningConfig, workspace: Workspace, *, policy: str) -> StatsReport:
    """Count words of tiers, rating and date. Raises ConfigError, FileNotFoundError before `compose` has run."""
    if policy not in config.policies:
        raise ConfigError(f"policy {policy!r}: unknown; the dataset has {', '.join(config.policies) or 'none'}")
    folder = workspace.captions(policy)
    if not list_parts(folder):
        raise FileNotFoundError(f"{folder}: no parts; run `python -m captioning compose --policy {policy}` first")
    rules = config.policies[policy]
    num_captions, counts = 0, Counter[tuple[str, str]]()
    for part in list_parts(folder):
        groups = read_part(part, ["groups"]).column("groups").combine_chunks()
        num_captions += len(groups)
        entries = pc.list_flatten(groups)
        first_words = pc.list_element(pc.struct_field(entries, "tags"), 0)
        pairs = pa.table({"group": pc.struct_field(entries, "group"), "word": first_words})
        for row in pairs.group_by(["group", "word"]).aggregate([([], "count_all")]).to_pylist():
            counts[row["group"], row["word"]] += row["count_all"]

    expected: dict[str, list[tuple[str, str]]] = {}
    for group, table in rules.tiers.items():
        expected[group] = [(word, f"{table.comparison} {threshold}") for threshold, word in table.steps]
        expected[group] += [(table.rest, "rest of them")] if table.rest else []
    if "rating" in rules.groups:
        expected["rating"] = [(word, "") for word in dict.fromkeys(rules.rating.words) if word]
    if "date" in rules.groups:
        expected["date"] = [(name, f"{first} to {last}") for name, (first, last) in config.periods.items()]
    tables = {
        group: [
            *(WordCount(word, rule, counts[group, word]) for word, rule in words),
            WordCount("(none)", "", num_captions - sum(counts[group, word] for word, _ in words)),
        ]
        for group, words in sorted(expected.items(), key=lambda item: rules.groups.index(item[0]))
    }
    statuses = {name: _statuses(workspace, name) for name in config.annotate.models}
    return StatsReport(policy, num_captions, tables, {name: found for name, found in statuses.items() if found})


def _statuses(workspace: Workspace, model: str) -> dict[str, int]:
    found: Counter[str] = Counter()
    for part in list_parts(workspace.annotations(model)):
        found.update(read_part(part, ["status"]).column("status").to_pylist())
    return dict(found.most_common())


def _text_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    is_number = [column >= len(header) - 2 and name != "status" for column, name in enumerate(header)]

    def line_of(cells: Sequence[str]) -> str:
        aligned = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, is_number, strict=True)
        )
        return "  ".join(aligned).rstrip()

    return "\n".join([line_of(header), line_of(["-" * width for width in widths]), *map(line_of, rows)])
