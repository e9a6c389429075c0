"""Numbers about a policy's captions: the tables of the seed's model card, tags, pairs, lengths, and spreads of scores.

Reads captions and annotations part by part; nothing is written. Words are counted in `tag_counts`, scores in
`score_histograms`; `stats_page` shows all on a page.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from captioning.composed import caption_parts, known_policy, not_current, scorers_of
from captioning.config import CaptioningConfig
from captioning.score_histograms import ScoreHistogram, score_histograms
from captioning.tag_counts import LENGTHS_HEAD, Lengths, PairCount, TagCount, WordCounter
from captioning.text_table import number_text, short_word, text_table
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
    """The numbers of one policy."""

    policy: str
    note: str
    """What is missing or not current; "" when everything is."""
    num_captions: int
    tables: dict[str, list[WordCount]]
    """By group; the last line of each counts the captions without a word of the group."""
    statuses: dict[str, dict[str, int]]
    """Rows by status, for each model of the dataset that has annotations."""
    tags: dict[str, list[TagCount]]
    """The most frequent words of all other groups, in the policy's order."""
    pairs: list[PairCount]
    """Characters and series that stand together most often."""
    lengths: list[Lengths]
    tokens: list[WordCount]
    """Captions by how many of CLIP's windows of 75 tokens they need; empty when tokens are not counted."""
    histograms: list[ScoreHistogram]

    def summary(self) -> str:
        """Return the tables as text."""
        blocks = [f"policy {self.policy}: {self.num_captions:,} captions"]
        blocks += [f"counted as they are, but not current: {self.note}"] if self.note else []
        for group, lines in self.tables.items():
            rows = [(line.rule, short_word(line.word), f"{line.count:,}", self.share(line.count)) for line in lines]
            blocks.append(text_table((group, "tag", "count", "share"), rows, numbers=(2, 3)))
        for group, tags in self.tags.items():
            counted = [(short_word(it.tag), f"{it.count:,}", self.share(it.count)) for it in tags]
            blocks.append(text_table((group, "count", "share"), counted, numbers=(1, 2)))
        if self.pairs:
            pairs = [(it.left, it.right, f"{it.count:,}") for it in self.pairs]
            blocks.append(text_table(("together", "and", "count"), pairs, numbers=(2,)))
        if self.lengths:
            blocks.append(text_table(LENGTHS_HEAD, [it.cells() for it in self.lengths], numbers=range(1, 6)))
        if self.tokens:
            tokens = [(it.word, f"{it.count:,}", self.share(it.count)) for it in self.tokens]
            blocks.append(text_table(("CLIP tokens", "count", "share"), tokens, numbers=(1, 2)))
        if self.histograms:
            scores = [
                (it.model, f"{it.num_scores:,}", *(number_text(value) for value in (it.minimum, it.mean, it.maximum)))
                for it in self.histograms
            ]
            blocks.append(text_table(("scorer", "scores", "least", "mean", "most"), scores, numbers=range(1, 5)))
        by_status = [
            (model, status, f"{count:,}") for model, counts in self.statuses.items() for status, count in counts.items()
        ]
        blocks.append(text_table(("model", "status", "rows"), by_status, numbers=(2,)))
        return "\n\n".join(blocks)

    def share(self, count: int) -> str:
        """Return a count as per cent of all captions."""
        return f"{count / max(self.num_captions, 1):.1%}"


def stats(
    config: CaptioningConfig, workspace: Workspace, *, policy: str, top: int = 20, count_tokens: bool = False
) -> StatsReport:
    """Count words, pairs, lengths and scores.

    top: how many words of each group, and pairs. count_tokens: lengths in CLIP tokens, too, by the policy's tokenizer.
    Captions are counted as they are; what is not current is said in the report's `note`. Raises ConfigError for an
    unknown policy, FileNotFoundError before `compose` has run.
    """
    rules = known_policy(config, policy)
    parts = caption_parts(workspace, policy)
    counter = WordCounter(tokenizer=rules.tokens.tokenizer if count_tokens else "")
    for part in parts:
        counter.add(read_part(part, ["text", "groups"]))
    tables = _tables(config, policy, counter)
    tags = counter.top_tags(top)
    statuses = {name: _statuses(workspace, name) for name in config.annotate.models}
    return StatsReport(
        policy=policy,
        note=not_current(config, workspace, policy=policy),
        num_captions=counter.num_captions,
        tables=tables,
        statuses={name: found for name, found in statuses.items() if found},
        tags={group: tags[group] for group in rules.groups if group in tags and group not in tables},
        pairs=counter.top_pairs(top),
        lengths=counter.lengths(),
        tokens=[WordCount(name, "", count) for name, count in counter.token_windows().items()],
        histograms=score_histograms(config, workspace, policy=policy, scorers=scorers_of(config)),
    )


def _tables(config: CaptioningConfig, policy: str, counter: WordCounter) -> dict[str, list[WordCount]]:
    rules = config.policies[policy]
    expected: dict[str, list[tuple[str, str]]] = {}
    for group, table in rules.tiers.items():
        expected[group] = [(word, f"{table.comparison} {number_text(edge)}") for edge, word in table.steps]
        expected[group] += [(table.rest, "rest of them")] if table.rest else []
    if "rating" in rules.groups:
        expected["rating"] = [(word, "") for word in dict.fromkeys(rules.rating.words) if word]
    if "date" in rules.groups:
        expected["date"] = [(name, f"{first} to {last}") for name, (first, last) in config.periods.items()]
    return {
        group: _table(group, words, counter)
        for group, words in sorted(expected.items(), key=lambda item: rules.groups.index(item[0]))
    }


def _table(group: str, expected: Sequence[tuple[str, str]], counter: WordCounter) -> list[WordCount]:
    """Return the words that a policy gives, other words that edits or an older policy have put there, and none."""
    counts = {word: count for (name, word), count in counter.first_words.items() if name == group}
    lines = [WordCount(word, rule, counts.pop(word, 0)) for word, rule in expected]
    lines += [WordCount(word, "not of the policy", counts[word]) for word in sorted(counts)]
    return [*lines, WordCount("(none)", "", counter.num_captions - sum(line.count for line in lines))]


def _statuses(workspace: Workspace, model: str) -> dict[str, int]:
    found: Counter[str] = Counter()
    for part in list_parts(workspace.annotations(model)):
        for row in read_part(part, ["status"]).column("status").value_counts().to_pylist():
            found[row["values"]] += row["counts"]
    return dict(found.most_common())
