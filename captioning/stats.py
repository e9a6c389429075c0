"""Counts of the words that a policy gave, in the tables of the seed's model card, and of pictures without one.

Reads captions and the status column of annotations; nothing is written.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from captioning.config import CaptioningConfig
from sharding.config import ConfigError
from sharding.schema import Workspace
from sharding.tables import list_parts, query


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
        rows = [
            (model, status, f"{count:,}") for model, counts in self.statuses.items() for status, count in counts.items()
        ]
        blocks.append(_text_table(("model", "status", "rows"), rows))
        return "\n\n".join(blocks)


def stats(config: CaptioningConfig, workspace: Workspace, *, policy: str) -> StatsReport:
    """Count words of tiers, rating and date. Raises ConfigError, FileNotFoundError before `compose` has run."""
    if policy not in config.policies:
        raise ConfigError(f"policy {policy!r}: unknown; the dataset has {', '.join(config.policies) or 'none'}")
    folder = workspace.captions(policy)
    if not list_parts(folder):
        raise FileNotFoundError(f"{folder}: no parts; run `python -m captioning compose --policy {policy}` first")
    rules = config.policies[policy]
    parts = _quoted(folder / "part-*.parquet")
    num_captions = query(f"select count(*) n from {parts}").column("n")[0].as_py()
    found = query(
        f'select g."group" grp, g.tags[1] word, count(*) n from (select unnest(groups) g from {parts}) group by 1, 2'
    )
    counts = {(row["grp"], row["word"]): row["n"] for row in found.to_pylist()}

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
            *(WordCount(word, rule, counts.get((group, word), 0)) for word, rule in words),
            WordCount("(none)", "", num_captions - sum(counts.get((group, word), 0) for word, _ in words)),
        ]
        for group, words in sorted(expected.items(), key=lambda item: rules.groups.index(item[0]))
    }
    statuses = {name: _statuses(workspace, name) for name in config.annotate.models}
    return StatsReport(policy, num_captions, tables, {name: found for name, found in statuses.items() if found})


def _statuses(workspace: Workspace, model: str) -> dict[str, int]:
    folder = workspace.annotations(model)
    if not list_parts(folder):
        return {}
    parts = _quoted(folder / "part-*.parquet")
    found = query(f"select status, count(*) n from {parts} group by 1 order by n desc, status")
    return {row["status"]: row["n"] for row in found.to_pylist()}


def _quoted(path: object) -> str:
    return "'" + str(path).replace("'", "''") + "'"


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
