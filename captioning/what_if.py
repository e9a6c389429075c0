"""What another edge of a tier would change: counts before and after, and the pictures nearest to the new edge.

Reads scores; captions need not be there, nothing is written.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captioning.composed import known_policy
from captioning.config import CaptioningConfig
from captioning.edit_filter import plain
from captioning.part_input import AnnotationMissingError
from captioning.thumbnails import find_files
from captioning.tiers import NO_TIER, tier_numbers
from captioning.what_if_report import NearPicture, NewEdge, TableChange, WhatIfReport, WordChange
from sharding.config import ConfigError, parse_config
from sharding.schema import Workspace
from sharding.tables import list_parts, read_part

NO_SCORE = "(no score)"


def parse_edges(texts: Sequence[str]) -> dict[str, float]:
    """Read `very_aesthetic=0.82` and the like. Raises ConfigError for anything else."""
    edges = {}
    for text in texts:
        word, sign, value = text.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if not sign or not word.strip() or not np.isfinite(number):
            raise ConfigError(f"--what-if {text!r}: expected WORD=NUMBER, such as very_aesthetic=0.82")
        if word.strip() in edges:
            raise ConfigError(f"--what-if {text!r}: {word.strip()} has two new edges")
        edges[word.strip()] = number
    return edges


def what_if(
    config: CaptioningConfig, workspace: Workspace, edges: Mapping[str, float], *, policy: str, num_samples: int = 6
) -> WhatIfReport:
    """Count the words that a policy would give with other edges.

    edges: by word of a tier, with spaces or underscores; GROUP.WORD where two tables have it. Raises ConfigError for an
    unknown policy or word and for edges out of order, FileNotFoundError without kept parts, AnnotationMissingError
    before `annotate`.
    """
    known_policy(config, policy)
    moved: dict[str, dict[int, float]] = {}
    for word, value in edges.items():
        group, place = _find(config, policy, word)
        moved.setdefault(group, {})[place] = value
    if not list_parts(workspace.kept):
        raise FileNotFoundError(f"{workspace.kept}: no parts; run `python -m sharding dedupe` first")
    tables = [_Table(config, policy, group, own, num_samples) for group, own in moved.items()]
    num_pictures = 0
    for part in list_parts(workspace.kept):
        keys = read_part(part, ["key"]).column("key")
        num_pictures += len(keys)
        for table in tables:
            path = workspace.annotations(table.model) / part.name
            if not path.is_file():
                raise AnnotationMissingError(
                    f"{path}: missing; run `python -m captioning annotate --models {table.model}` first"
                )
            table.add(keys, _scores(read_part(path), keys))
    files = find_files(workspace, [key for table in tables for key in table.sampled_keys()])
    return WhatIfReport(policy, num_pictures, tuple(table.change(files) for table in tables))


def _find(config: CaptioningConfig, policy: str, word: str) -> tuple[str, int]:
    """Return the table and step of a word."""
    tiers = config.policies[policy].tiers
    found = []
    for group, table in tiers.items():
        for place, (_, name) in enumerate(table.steps):
            if plain(word).casefold() in (plain(name).casefold(), plain(f"{group}.{name}").casefold()):
                found.append((group, place))
    if not found:
        known = ", ".join(name.replace(" ", "_") for table in tiers.values() for _, name in table.steps)
        raise ConfigError(f"--what-if {word}: no tier of policy {policy!r} with an edge; known: {known or 'none'}")
    if len(found) > 1:
        raise ConfigError(f"--what-if {word}: stands in {' and '.join(group for group, _ in found)}; say GROUP.{word}")
    return found[0]


def _scores(annotation: pa.Table, keys: pa.ChunkedArray) -> npt.NDArray[np.float32]:
    """Return (N,) float32 in the order of keys, NaN where there is no score."""
    if not annotation.column("key").equals(keys):
        annotation = annotation.take(pc.index_in(keys, value_set=annotation.column("key")))
    scores = pc.if_else(pc.equal(annotation.column("status"), "ok"), annotation.column("score"), None)
    return np.asarray(pc.fill_null(scores, float("nan")), dtype=np.float32)


class _Table:
    """One table of tiers with its old and new edges; takes scores part by part."""

    def __init__(
        self, config: CaptioningConfig, policy: str, group: str, moved: Mapping[int, float], num_samples: int
    ) -> None:
        self._rules, self._group, self._moved = config.policies[policy].tiers[group], group, dict(sorted(moved.items()))
        if len(self._rules.models) != 1 or self._rules.votes is not None:
            raise ConfigError(f"--what-if: policies.{policy}.tiers.{group} is not decided by one score alone")
        self.model = self._rules.model
        self._before = [threshold for threshold, _ in self._rules.steps]
        self._after = [moved.get(place, threshold) for place, threshold in enumerate(self._before)]
        steps = tuple(zip(self._after, (word for _, word in self._rules.steps), strict=True))
        values = self._rules.model_dump() | {"steps": steps}
        parse_config(values, type(self._rules), name=f"--what-if, policies.{policy}.tiers.{group}")
        self._num_samples = num_samples
        num_words = len(self._before) + 2  # the rest; the last is NO_TIER, which is -1
        self._counts = np.zeros((2, num_words), np.int64)
        self._num_changed = 0
        self._near: dict[int, dict[bool, list[tuple[float, str, float, int, int]]]] = {
            place: {True: [], False: []} for place in self._moved
        }

    def add(self, keys: pa.ChunkedArray, scores: npt.NDArray[np.float32]) -> None:
        comparison = self._rules.comparison
        before, after = (tier_numbers(scores, edges, comparison=comparison) for edges in (self._before, self._after))
        for row, numbers in enumerate((before, after)):
            self._counts[row] += np.bincount(numbers % self._counts.shape[1], minlength=self._counts.shape[1])
        self._num_changed += int((before != after).sum())
        for place, edge in self._moved.items():
            distances = np.abs(scores.astype(np.float64) - np.float32(edge))
            for passes, listed in self._near[place].items():
                is_side = (after != NO_TIER) & ((after <= place) == passes)
                rows = np.flatnonzero(is_side)
                if len(rows) > self._num_samples:
                    limit = np.partition(distances[rows], self._num_samples - 1)[self._num_samples - 1]
                    rows = rows[distances[rows] <= limit][: 4 * self._num_samples + 64]
                names = keys.take(pa.array(rows)).to_pylist()
                listed += [
                    (float(distances[row]), key, float(scores[row]), int(before[row]), int(after[row]))
                    for row, key in zip(rows.tolist(), names, strict=True)
                ]
                self._near[place][passes] = sorted(listed)[: self._num_samples]

    def sampled_keys(self) -> list[str]:
        return [row[1] for sides in self._near.values() for listed in sides.values() for row in listed]

    def change(self, files: Mapping[str, tuple[str, str]]) -> TableChange:
        names = [*(word for _, word in self._rules.steps), self._rules.rest or "(no word)", NO_SCORE]
        counts = self._counts.tolist()
        words = tuple(
            WordChange(
                name,
                self._before[place] if place < len(self._before) else None,
                self._after[place] if place < len(self._after) else None,
                counts[0][place],
                counts[1][place],
            )
            for place, name in enumerate(names)
        )

        def pictures(place: int, passes: bool) -> tuple[NearPicture, ...]:
            return tuple(
                NearPicture(key, *files.get(key, ("", "")), score, names[before], names[after])
                for _, key, score, before, after in self._near[place][passes]
            )

        edges = tuple(
            NewEdge(names[place], self._before[place], edge, pictures(place, True), pictures(place, False))
            for place, edge in self._moved.items()
        )
        return TableChange(self._group, self.model, self._rules.comparison, words, self._num_changed, edges)
