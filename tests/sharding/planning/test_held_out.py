"""What is held out is trained by no chunk, nor are its relatives, whatever is added later."""

import hashlib

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.planning.held_out import separate
from sharding.planning.rows import CURRENT, plan_rows
from sharding.schema import HELD_OUT, PLAN, RELATIVES


def key_of(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()[:16]


def current(numbers) -> pa.Table:
    """Numbers below 1,000 are filed under a, others under b."""
    rows = [{"key": key_of(n), "dataset": "a" if n < 1_000 else "b", "period": "", "repeats": 1, "loss_weight": 1.0}
            for n in numbers]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=CURRENT)


def relatives(*groups) -> pa.Table:
    rows = [{"component": number, "key": key_of(member)} for number, group in enumerate(groups) for member in group]
    return pa.Table.from_pylist(rows, schema=RELATIVES)


def plan(previous, numbers, *, size, groups=(), sealed=(), chunk_size=5, max_fraction=0.5, trained=None):
    """Return (the whole plan, keys dropped as related to held out, as related to trained), as `make_plan` does."""
    now = current(numbers)
    found = separate(previous, now, size=size, max_fraction=max_fraction, seed=0, sealed=sealed, trained=trained,
                     relatives=relatives(*groups))  # fmt: skip
    out = {
        key for key, free in zip(now.column("key").to_pylist(), found.is_trainable.tolist(), strict=True) if not free
    }
    stays = [row["chunk"] != HELD_OUT and row["key"] not in out for row in previous.to_pylist()]
    rows = plan_rows(previous.filter(pa.array(stays, pa.bool_())), now.filter(pa.array(found.is_trainable)),
                     chunk_size=chunk_size, seed=0, sealed=sealed)  # fmt: skip
    keys = now.column("key").to_pylist()
    whole = pa.concat_tables([found.held_out, rows]).sort_by(
        [("dataset", "ascending"), ("chunk", "ascending"), ("position", "ascending")]
    )
    return whole, {keys[i] for i in found.related_to_held_out[:, 0]}, {keys[i] for i in found.related_to_trained[:, 0]}


def held(table) -> set[str]:
    return {row["key"] for row in table.to_pylist() if row["chunk"] == HELD_OUT}


def trained_side(table) -> set[str]:
    return {row["key"] for row in table.to_pylist() if row["chunk"] != HELD_OUT}


def chunk(table, dataset, number) -> list[str]:
    return [row["key"] for row in table.to_pylist() if (row["dataset"], row["chunk"]) == (dataset, number)]


def test_each_dataset_gives_its_quota_and_is_cut_without_it():
    table, _, _ = plan(PLAN.empty_table(), [*range(40), *range(1_000, 1_006)], size=8, max_fraction=0.5)

    counts = [len(chunk(table, name, HELD_OUT)) for name in "ab"]
    assert counts == [8, 3]  # half of b's 6 is the most that is taken
    assert held(table).isdisjoint(trained_side(table))
    assert len(trained_side(table)) == 35
    assert [len(chunk(table, "a", number)) for number in range(7)] == [5, 5, 5, 5, 5, 5, 2]


@settings(max_examples=80, deadline=None)
@given(
    first=st.sets(st.integers(0, 60), min_size=1),
    added=st.sets(st.integers(0, 60)),
    pairs=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=12),
    later_pairs=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=4),
    size=st.integers(1, 12),
    seal=st.integers(0, 3),
)
def test_sides_stay_apart_when_data_and_relations_are_added(first, added, pairs, later_pairs, size, seal):
    spread = {n: n if n % 3 else n + 1_000 for n in range(61)}  # two datasets
    first, added = {spread[n] for n in first}, {spread[n] for n in added}
    before, _, _ = plan(PLAN.empty_table(), first, size=size, groups=_components(pairs, spread, first))
    sealed = {(name, number) for name in "ab" for number in range(seal) if chunk(before, name, number)}
    groups = _components([*pairs, *later_pairs], spread, first | added)

    after, to_held_out, to_trained = plan(before, first | added, size=size, groups=groups, sealed=sealed)

    assert all(chunk(after, *one) == chunk(before, *one) for one in sealed)
    out, trained = held(after), trained_side(after)
    assert out.isdisjoint(trained)
    for group in groups:
        members = {key_of(member) for member in group}
        assert not (members & out and members & trained)
    assert held(before) <= out | to_trained
    assert out | trained | to_held_out | to_trained == {key_of(n) for n in first | added}
    again, _, _ = plan(after, first | added, size=size, groups=groups, sealed=sealed)
    assert held(again) - to_trained >= out


def _components(pairs, spread, there) -> list[set[int]]:
    groups: list[set[int]] = []
    for pair in pairs:
        joined = {spread[n] for n in pair} & there
        for group in [group for group in groups if group & joined]:
            groups.remove(group)
            joined |= group
        if joined:
            groups.append(joined)
    return groups


def test_turning_it_on_later_takes_nothing_from_sealed_chunks_and_the_last_chunks_first():
    before, _, _ = plan(PLAN.empty_table(), range(32), size=0)
    sealed = {("a", 0), ("a", 5)}

    after, _, _ = plan(before, range(32), size=4, sealed=sealed)

    assert all(chunk(after, *one) == chunk(before, *one) for one in sealed)
    assert held(after) <= {*chunk(before, "a", 6), *chunk(before, "a", 4)}
    assert [chunk(after, "a", number) for number in range(4)] == [chunk(before, "a", number) for number in range(4)]
    position = {row["key"]: row["position"] for row in after.to_pylist()}
    assert [position[key] for key in chunk(after, "a", 4)] == list(range(len(chunk(after, "a", 4))))


def test_what_a_materialized_wave_has_trained_is_not_held_out():
    trained = pa.table({"key": [key_of(n) for n in range(18)]})

    table, _, _ = plan(PLAN.empty_table(), range(20), size=5, groups=[(0, 18)], trained=trained)

    assert held(table) == {key_of(19)}


def test_zero_releases_what_was_held_out_and_a_smaller_number_does_not():
    before, _, _ = plan(PLAN.empty_table(), range(30), size=6)

    assert held(plan(before, range(30), size=2)[0]) == held(before)
    assert held(plan(before, range(30), size=0)[0]) == set()
    assert held(plan(before, range(30), size=0, sealed={("a", HELD_OUT)})[0]) == held(before)


def test_a_group_that_does_not_fit_is_left_for_training():
    table, _, _ = plan(PLAN.empty_table(), range(12), size=2, groups=[range(11)])

    assert held(table) == {key_of(11)}


@pytest.mark.parametrize("groups", [(), [(1, 2)]])
def test_without_held_out_nothing_is_dropped(groups):
    table, to_held_out, to_trained = plan(PLAN.empty_table(), range(12), size=0, groups=groups)

    assert len(trained_side(table)) == 12 and not to_held_out and not to_trained
