"""Tell why dedupe kept a picture or dropped it: `python -m sharding dedupe explain KEY|PATH DATASET.toml`.

Its group with distances, the criteria compared value by value with its keeper (or with its closest rival), what people
decided, and for every picture that it has a pair with why the two are in one group or not. Reads the tables that dedupe
has written and decides nothing; all other facts are told by `show`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sharding.config import DatasetConfig
from sharding.images import LOSSLESS_FORMATS
from sharding.reporting.questions import Questions, quoted, rows_of
from sharding.schema import DECISIONS, DROPS, GROUPS, MANIFEST, PAIRS, PLAN, Workspace
from sharding.show import show
from sharding.tables import list_parts

MAX_OTHERS = 20
"""Members of its group, and pictures it has a pair with, that are told."""

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Criterion:
    """One thing by which two pictures are compared. winner: "this", "other" or "" when they are equal."""

    name: str
    this: str
    other: str
    winner: str


@dataclass(frozen=True)
class Other:
    """Another picture. distance: bits between the two; None for a crop. note: what stands between them, or not."""

    key: str
    path: str
    kind: str
    distance: int | None
    note: str


@dataclass(frozen=True)
class Explanation:
    """Why a picture stayed or went."""

    key: str
    fate: str
    rival: str
    """The key that it is compared with: its keeper, or for a keeper the nearest of its group; "" when alone."""
    criteria: tuple[Criterion, ...]
    """In the order in which they are asked, up to the first that differs."""
    group: tuple[Other, ...]
    """The other members of its group, the keeper first, then by distance to the keeper."""
    near: tuple[Other, ...]
    """The pictures it has a pair with that are not in its group."""

    def summary(self) -> str:
        """Return all of it as text."""
        lines = [f"{self.key}  {self.fate}"]
        if self.criteria:
            lines += [f"  compared with {self.rival}:"]
            lines += [
                f"    {c.name}: {c.this} against {c.other}" + (f" → {c.winner} wins" if c.winner else ", equal")
                for c in self.criteria
            ]
        for title, others in (("its group", self.group), ("like it, but not in its group", self.near)):
            lines += [f"  {title}:"] if others else []
            lines += [
                f"    {o.key}  {o.kind}{'' if o.distance is None else f', {o.distance} bits'}: {o.note}  {o.path}"
                for o in others
            ]
        if not self.group and not self.near:
            lines.append("  no other picture is like it")
        return "\n".join(lines)


def explain(config: DatasetConfig, workspace: Workspace, text: str) -> list[Explanation]:
    """Return what dedupe did with every key that begins with `text`, or with the file of that path.

    Raises ValueError when there is none, FileNotFoundError before dedupe has run.
    """
    if not list_parts(workspace.dedupe / "groups"):
        raise FileNotFoundError(f"{workspace.dedupe / 'groups'}: no parts; run `python -m sharding dedupe` first")
    fates = {facts.key: facts.fate for facts in show(config, workspace, text)}
    with Questions() as questions:
        return [_Case(config, workspace, questions, key).explain(fate) for key, fate in fates.items()]


class _Case:
    """One key and all rows about it and the pictures near to it."""

    def __init__(self, config: DatasetConfig, workspace: Workspace, questions: Questions, key: str) -> None:
        self.config = config
        self.key = key
        groups = rows_of(list_parts(workspace.dedupe / "groups"), GROUPS)
        self.members = questions.ask(
            f'select key, is_keeper, distance, rule, kind, "group" from {groups} where "group" in '
            f'(select "group" from {groups} where key = {quoted(key)}) order by is_keeper desc, distance, key'
        )
        number = int(key or "0", 16)
        self.pairs = questions.ask(
            f"select * from {rows_of(list_parts(workspace.dedupe / 'pairs'), PAIRS)} "
            f'where "left" = {number} or "right" = {number} order by distance, "left", "right" limit {MAX_OTHERS}'
        )
        for pair in self.pairs:
            pair["key"] = f"{pair['left'] + pair['right'] - number:016x}"
        keys = {key, *(row["key"] for row in self.members[: MAX_OTHERS + 1]), *(pair["key"] for pair in self.pairs)}
        self.keepers = self._column(questions, workspace.dedupe / "drops", DROPS, "kept_key", keys)
        keys |= set(filter(None, self.keepers.values()))
        self.decided = self._column(questions, workspace.decisions, DECISIONS, "decision", keys)
        self.planned = self._column(questions, workspace.plan, PLAN, "chunk", keys)
        kept = self._column(questions, workspace.kept, MANIFEST, "path", keys)
        manifest = rows_of(list_parts(workspace.manifest), MANIFEST)
        self.records: dict[str, Record] = {}
        rows = questions.ask(f"select * from {manifest} where key in {_list(keys)} order by source, path")
        for row in rows:  # of several files with one key the kept one, else the first
            if row["key"] not in self.records or kept.get(row["key"]) == row["path"]:
                self.records[row["key"]] = row

    @staticmethod
    def _column(questions: Questions, folder: Any, schema: Any, column: str, keys: set[str]) -> dict[str, Any]:
        rows = questions.ask(
            f"select key, {column} from {rows_of(list_parts(folder), schema)} where key in {_list(keys)}"
        )
        return {row["key"]: row[column] for row in rows}

    def explain(self, fate: str) -> Explanation:
        own = next((row for row in self.members if row["key"] == self.key), None)
        others = [row for row in self.members if row["key"] != self.key]
        rival = others[0]["key"] if own and others else ""
        if own and own["is_keeper"] and others:
            rival = min(others, key=lambda row: self._order(row["key"]))["key"]
        in_group = {row["key"] for row in self.members}
        return Explanation(
            self.key,
            fate,
            rival,
            self._criteria(rival) if rival else (),
            tuple(self._member(row) for row in others[:MAX_OTHERS]),
            tuple(self._neighbour(pair) for pair in self.pairs if pair["key"] not in in_group),
        )

    def _member(self, row: Record) -> Other:
        note = "the keeper" if row["is_keeper"] else f"dropped for the keeper by {row['rule']}"
        kind = "keeper" if row["is_keeper"] else row["kind"]
        return Other(row["key"], self._path(row["key"]), kind, row["distance"], note)

    def _neighbour(self, pair: Record) -> Other:
        return Other(pair["key"], self._path(pair["key"]), pair["kind"], pair["distance"], self._why_not(pair))

    def _why_not(self, pair: Record) -> str:
        """Say why the two of a pair are not in one group."""
        other = pair["key"]
        for key in (self.key, other):
            if self.decided.get(key) in ("not_a_duplicate", "drop"):
                return f"{self.decided[key]} was decided about {key}"
        if pair["kind"] == "variant":
            return "a variant: near by hash, but different in a detail (dedupe.keep_variants)"
        for dropped, stayed in ((self.key, other), (other, self.key)):
            if (keeper := self.keepers.get(dropped)) and keeper != stayed:
                bits = self._bits(stayed, keeper)
                limit = self.config.dedupe.max_diameter
                text = f"{dropped} went for {keeper}, from which {stayed} is {bits} bits away"
                return f"{text}, more than max_diameter {limit}" if bits > limit else text
        reasons = [
            f"{key} {what}"
            for key in (self.key, other)
            for what, holds in (
                ("is planned", key in self.planned),
                ("is to be kept by decision", self.decided.get(key) == "keep"),
                ("is a reference", self._is_reference(key)),
            )
            if holds
        ]
        return ", ".join(reasons) or "farther apart than max_diameter, or variants of one another"

    # --- the criteria ---

    def _criteria(self, rival: str) -> tuple[Criterion, ...]:
        names = ("reference", "planned", "preferred", *self.config.dedupe.keeper, "key")
        this, other = self._values(self.key), self._values(rival)
        found = []
        for place, name in enumerate(names):
            winner = _winner(this[place:][:1], other[place:][:1])
            if name == "planned" and winner and winner == _winner(this[place + 1 :], other[place + 1 :]):
                continue  # it is planned because it won, not the other way round
            found.append(Criterion(name, this[place][1], other[place][1], winner))
            if winner:
                break
        return tuple(found)

    def _order(self, key: str) -> tuple[Any, ...]:
        return tuple(value for value, _ in self._values(key))

    def _values(self, key: str) -> list[tuple[Any, str]]:
        """Return per criterion (smaller wins, as people read it)."""
        record = self.records[key]
        source = self.config.sources.get(record["source"])
        priority = source.priority if source is not None else 0
        is_lossless = record["format"] in LOSSLESS_FORMATS
        date = record["created_at"]
        values: dict[str, tuple[Any, str]] = {
            "priority": (-priority, f"{priority} ({record['source']})"),
            "pixels": (-record["width"] * record["height"], f"{record['width']}x{record['height']}"),
            "lossless": (not is_lossless, f"{'lossless' if is_lossless else 'lossy'} ({record['format']})"),
            "bytes": (-record["num_bytes"], f"{record['num_bytes']:,}"),
            "date": (date.timestamp() if date else float("inf"), f"{date:%Y-%m-%d}" if date else "unknown"),
            "key": (key, key),
        }
        flags = (self._is_reference(key), key in self.planned, self.decided.get(key) == "preferred_keeper")
        yes_no = [(not flag, "yes" if flag else "no") for flag in flags]
        return [*yes_no, *(values[name] for name in (*self.config.dedupe.keeper, "key"))]

    def _is_reference(self, key: str) -> bool:
        source = self.config.sources.get(self.records[key]["source"]) if key in self.records else None
        return source is not None and source.is_reference

    def _path(self, key: str) -> str:
        record = self.records.get(key)
        return f"{record['source']}/{record['path']}" if record else "(gone)"

    def _bits(self, left: str, right: str) -> int:
        one, other = (int.from_bytes(self.records[key]["phash"], "big") for key in (left, right))
        return (one ^ other).bit_count()


def _winner(this: Sequence[tuple[Any, str]], other: Sequence[tuple[Any, str]]) -> str:
    """Return which of the two the first value that differs speaks for: this, other, or "" if none differs."""
    for (mine, _), (its, _) in zip(this, other, strict=True):
        if mine != its:
            return "this" if mine < its else "other"
    return ""


def _list(keys: Sequence[str] | set[str]) -> str:
    return f"({', '.join(quoted(key) for key in sorted(keys))})"
