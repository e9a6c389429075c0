"""The answer to a what-if: counts before and after, and pictures near the new edges. As a page: `stats_page`."""

from dataclasses import dataclass

from captioning.text_table import number_text, text_table


@dataclass(frozen=True)
class WordChange:
    """A word of a table, its edge and its count before and after; None is the word of the rest, or no score."""

    word: str
    edge_before: float | None
    edge_after: float | None
    count_before: int
    count_after: int

    def counts(self) -> tuple[str, str, str]:
        """Return both counts and the change, "" for none, as text."""
        change = self.count_after - self.count_before
        return f"{self.count_before:,}", f"{self.count_after:,}", f"{change:+,}" if change else ""


@dataclass(frozen=True)
class NearPicture:
    """A picture near a new edge."""

    key: str
    source: str
    path: str
    score: float
    word_before: str
    word_after: str

    def words(self) -> str:
        """Return the word, or both when they differ."""
        return self.word_after if self.word_before == self.word_after else f"{self.word_before} → {self.word_after}"


@dataclass(frozen=True)
class NewEdge:
    """An edge that moves, and pictures on both sides of where it goes, the nearest first."""

    word: str
    before: float
    after: float
    passing: tuple[NearPicture, ...]
    failing: tuple[NearPicture, ...]


@dataclass(frozen=True)
class TableChange:
    """What happens to one table of tiers."""

    group: str
    model: str
    comparison: str
    words: tuple[WordChange, ...]
    num_changed: int
    """Pictures that get another word."""
    edges: tuple[NewEdge, ...]


@dataclass(frozen=True)
class WhatIfReport:
    """All tables with new edges."""

    policy: str
    num_pictures: int
    tables: tuple[TableChange, ...]

    def summary(self) -> str:
        """Return the counts and pictures as text."""
        blocks = []
        for table in self.tables:
            blocks.append(
                f"policy {self.policy}, {table.group} by {table.model}: {table.num_changed:,} of {self.num_pictures:,} "
                "pictures would get another word; nothing was changed"
            )
            head = (table.group, "edge", "new edge", "count", "new count", "change")
            rows = [(it.word, *map(edge_text, (it.edge_before, it.edge_after)), *it.counts()) for it in table.words]
            blocks.append(text_table(head, rows, numbers=(1, 2, 3, 4, 5)))
            for edge in table.edges:
                near = [
                    (side, number_text(it.score), it.key, f"{it.source}/{it.path}", it.words())
                    for side, pictures in (("above", reversed(edge.passing)), ("below", edge.failing))
                    for it in pictures
                ]
                near_head = (f"{edge.word} {number_text(edge.after)}", "score", "key", "file", "word")
                blocks.append(text_table(near_head, near, numbers=(1,)))
        return "\n\n".join(blocks)


def edge_text(edge: float | None) -> str:
    """Return an edge, "" for a word without one."""
    return "" if edge is None else number_text(edge)
