"""Count the duplicate groups of a workspace and pick some to look at. Decides nothing; that is `dedupe`."""

from dataclasses import dataclass

from sharding.reporting.questions import Questions, quoted, rows_of
from sharding.schema import DROPS, GROUPS, MANIFEST, Workspace
from sharding.tables import list_parts

MAX_MEMBERS = 8
"""Members of a sampled group that are told; the others are counted."""


@dataclass(frozen=True)
class GroupMember:
    """A picture of a duplicate group. distance: bits to the keeper; None for a crop of it."""

    key: str
    source: str
    path: str
    width: int
    height: int
    num_bytes: int
    is_keeper: bool
    distance: int | None
    rule: str
    kind: str
    """How it is like its keeper; "" for a keeper."""


@dataclass(frozen=True)
class GroupSample:
    """One duplicate group. members: the keeper first, then by distance, at most MAX_MEMBERS."""

    group: int
    num_members: int
    members: tuple[GroupMember, ...]


@dataclass(frozen=True)
class Duplicates:
    """All duplicate groups in numbers. by_size: (members, groups); the others: (value, dropped pictures)."""

    num_groups: int
    num_members: int
    largest: int
    by_size: tuple[tuple[int, int], ...]
    by_rule: tuple[tuple[str, int], ...]
    by_kind: tuple[tuple[str, int], ...]
    by_distance: tuple[tuple[int, int], ...]
    sample: tuple[GroupSample, ...]


def count_duplicates(questions: Questions, workspace: Workspace, *, num_groups: int, seed: int) -> Duplicates:
    """Count groups by size, rule and distance, and pick `num_groups` of them by `seed`."""
    groups = f"(select * from {rows_of(list_parts(workspace.dedupe / 'groups'), GROUPS)})"
    sizes = f'(select "group", count(*) as size from {groups} group by "group")'
    by_size = questions.ask(f"select size, count(*) as n from {sizes} group by size order by size")
    reasons = {
        column: questions.ask(
            f"select coalesce({column}, '') as value, count(*) as n from {groups} where not is_keeper "
            "group by value order by n desc, value"
        )
        for column in ("rule", "kind")
    }
    drops = rows_of(list_parts(workspace.dedupe / "drops"), DROPS)
    distances = questions.ask(
        f"select distance, count(*) as n from {drops} where distance is not null group by distance order by distance"
    )
    return Duplicates(
        num_groups=sum(row["n"] for row in by_size),
        num_members=sum(row["size"] * row["n"] for row in by_size),
        largest=max((row["size"] for row in by_size), default=0),
        by_size=tuple((row["size"], row["n"]) for row in by_size),
        by_rule=tuple((row["value"], row["n"]) for row in reasons["rule"]),
        by_kind=tuple((row["value"], row["n"]) for row in reasons["kind"]),
        by_distance=tuple((row["distance"], row["n"]) for row in distances),
        sample=_sample(questions, workspace, groups, num_groups=num_groups, seed=seed) if by_size else (),
    )


def _sample(
    questions: Questions, workspace: Workspace, groups: str, *, num_groups: int, seed: int
) -> tuple[GroupSample, ...]:
    """Pick by a hash of the keeper's key, which does not change when groups are numbered anew."""
    picked = questions.ask(
        f'select "group" from {groups} where is_keeper order by md5(key || {quoted(seed)}) limit {num_groups}'
    )
    if not picked:
        return ()
    numbers = ", ".join(str(row["group"]) for row in picked)
    manifest = rows_of(list_parts(workspace.manifest), MANIFEST)
    rows = questions.ask(
        f"""
        with members as (select * from {groups} where "group" in ({numbers})),
        files as (
            select key, min(source) as source, arg_min(path, source) as path, any_value(width) as width,
                any_value(height) as height, any_value(num_bytes) as num_bytes
            from {manifest} where key in (select key from members) group by key)
        select members.*, source, path, width, height, num_bytes from members left join files using (key)
        order by "group", is_keeper desc, distance, key
        """
    )
    return tuple(_group(row["group"], [member for member in rows if member["group"] == row["group"]]) for row in picked)


def _group(number: int, rows: list[dict[str, object]]) -> GroupSample:
    names = GroupMember.__dataclass_fields__
    defaults = {"source": "", "path": "", "width": 0, "height": 0, "num_bytes": 0, "rule": "", "kind": ""}
    members = [
        GroupMember(**{name: defaults.get(name) if row[name] is None else row[name] for name in names})  # type: ignore[arg-type]
        for row in rows[:MAX_MEMBERS]
    ]
    return GroupSample(number, len(rows), tuple(members))
