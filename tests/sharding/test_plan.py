"""Which sample goes into which chunk."""

import hashlib
from datetime import UTC, datetime

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.plan import make_plan, sealed_chunks
from sharding.planning.rows import CURRENT, plan_rows
from sharding.schema import HELD_OUT, MANIFEST, PLAN, RELATIVES
from sharding.tables import read_parts, write_part

SEED_CARD = {
    "newest": (1_848_331, 232), "recent": (1_380_630, 173), "mid": (993_227, 125), "early": (566_152, 71),
    "oldest": (160_397, 21), "pixiv": (343_614, 43), "visual novel cg": (231_358, 29), "anime wallpaper": (104_790, 14),
}  # fmt: skip


def key_of(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()[:16]


def current(*numbers: int, dataset: str = "a") -> pa.Table:
    return table_of([key_of(number) for number in numbers], [dataset] * len(numbers))


def table_of(keys, datasets) -> pa.Table:
    count = len(keys)
    columns = [keys, datasets, [""] * count, pa.array([1] * count, pa.int32()), pa.array([1] * count, pa.float32())]
    return pa.table(columns, schema=CURRENT)


def chunks_of(plan: pa.Table) -> dict[tuple[str, int], list[str]]:
    chunks: dict[tuple[str, int], list[str]] = {}
    for row in plan.to_pylist():
        chunks.setdefault((row["dataset"], row["chunk"]), []).append(row["key"])
        assert row["position"] == len(chunks[row["dataset"], row["chunk"]]) - 1
    return chunks


def test_the_seed_cards_counts_give_its_chunks():
    tables = []
    for number, (name, (count, _)) in enumerate(SEED_CARD.items()):
        keys = pa.array([f"{number:02d}{index:014d}" for index in range(0, count, 100)])
        tables.append(table_of(keys, [name] * len(keys)))

    # A hundredth of the images in chunks of 80: ceil(n / 100) images in ceil(n / 8,000) chunks.
    plan = plan_rows(PLAN.empty_table(), pa.concat_tables(tables), chunk_size=80, seed=0)

    sizes = {name: [] for name in SEED_CARD}
    for (name, _), keys in chunks_of(plan).items():
        sizes[name].append(len(keys))
    assert {name: len(of) for name, of in sizes.items()} == {name: chunks for name, (_, chunks) in SEED_CARD.items()}
    assert sum(len(of) for of in sizes.values()) == 708
    assert sizes["newest"][-1] == 4


def test_the_seed_cards_newest_ends_with_a_chunk_of_331():
    count, chunks = SEED_CARD["newest"]
    keys = pa.array([f"{index:016x}" for index in range(count)])

    plan = plan_rows(PLAN.empty_table(), table_of(keys, ["newest"] * count), chunk_size=8_000, seed=0)

    last = plan.column("chunk")[-1].as_py()
    assert last == chunks - 1
    assert plan.filter(pa.compute.equal(plan.column("chunk"), last)).num_rows == 331


@settings(max_examples=60, deadline=None)
@given(
    first=st.sets(st.integers(0, 60)),
    added=st.sets(st.integers(0, 60)),
    removed=st.sets(st.integers(0, 60)),
    chunk_size=st.integers(1, 9),
    seal_last=st.booleans(),
)
def test_full_and_sealed_chunks_never_change_and_every_kept_key_is_planned_once(
    first, added, removed, chunk_size, seal_last
):
    before = plan_rows(PLAN.empty_table(), current(*first), chunk_size=chunk_size, seed=1)
    old = chunks_of(before)
    sealed = {max(old)} if seal_last and old else set()
    kept = (first | added) - removed

    after = plan_rows(before, current(*kept), chunk_size=chunk_size, seed=1, sealed=sealed)

    new = chunks_of(after)
    fixed = {name for name, keys in old.items() if len(keys) == chunk_size or name in sealed}
    assert all(new[name] == old[name] for name in fixed)
    planned = after.column("key").to_pylist()
    assert len(planned) == len(set(planned))
    assert {key_of(number) for number in kept} <= set(planned)
    assert set(planned) == {key_of(number) for number in kept} | {key for name in fixed for key in old[name]}
    assert all(len(keys) <= chunk_size for keys in new.values())
    assert plan_rows(after, current(*kept), chunk_size=chunk_size, seed=1, sealed=sealed).equals(after)


def test_a_short_last_chunk_keeps_its_keys_and_is_filled_up():
    before = plan_rows(PLAN.empty_table(), current(*range(13)), chunk_size=10, seed=0)

    after = plan_rows(before, current(*range(25)), chunk_size=10, seed=0)

    old, new = chunks_of(before), chunks_of(after)
    assert len(old["a", 1]) == 3
    assert set(old["a", 1]) < set(new["a", 1])
    assert [len(new["a", number]) for number in range(3)] == [10, 10, 5]


def test_the_order_of_the_kept_keys_does_not_matter_but_the_seed_does():
    forward = plan_rows(PLAN.empty_table(), current(*range(30)), chunk_size=7, seed=0)
    backward = plan_rows(PLAN.empty_table(), current(*reversed(range(30))), chunk_size=7, seed=0)
    other = plan_rows(PLAN.empty_table(), current(*range(30)), chunk_size=7, seed=1)

    assert forward.equals(backward)
    assert chunks_of(forward) != chunks_of(other)


def test_a_chunk_is_a_uniform_sample_of_its_dataset():
    # Keys that are consecutive numbers, as unlike a hash as can be: the mean of a chunk must still be the middle.
    keys = pa.array([f"{index:016x}" for index in range(20_000)])
    plan = plan_rows(PLAN.empty_table(), table_of(keys, ["a"] * 20_000), chunk_size=1_000, seed=0)

    for numbers in chunks_of(plan).values():
        mean = sum(int(key, 16) for key in numbers) / len(numbers)
        assert abs(mean - 9_999.5) < 5 * 5_774 / 1_000**0.5


def test_a_key_that_changes_its_dataset_stays_in_a_full_chunk():
    before = plan_rows(PLAN.empty_table(), current(*range(4), dataset="a"), chunk_size=4, seed=0)

    after = plan_rows(before, current(*range(6), dataset="b"), chunk_size=4, seed=0)

    assert set(chunks_of(after)["a", 0]) == {key_of(number) for number in range(4)}
    assert set(chunks_of(after)["b", 0]) == {key_of(4), key_of(5)}


# --- the workspace ---


def write_kept(workspace, years: dict[int, int | None], *, source: str = "photos", made_from: str = "test") -> None:
    rows = [
        {
            **dict.fromkeys(MANIFEST.names),
            "key": key_of(number),
            "source": source,
            "path": f"{number}.jpg",
            "created_at": datetime(year, 5, 1, tzinfo=UTC) if year else None,
            "status": "kept",
        }
        for number, year in years.items()
    ]
    write_part(workspace.kept / "part-00000.parquet", pa.Table.from_pylist(rows, schema=MANIFEST), made_from=made_from)


@pytest.fixture
def by_period(make_config):
    root = make_config().sources["photos"].root
    return make_config(
        sources={"photos": {"root": str(root), "dataset": "{period}"}},
        periods={"newest": [2022, 2024], "oldest": [2005, 2010]},
        plan={"chunk_size": 4},
    )


def test_pictures_filed_by_date_go_to_their_period_or_are_dropped(by_period, workspace):
    write_kept(workspace, {1: 2022, 2: 2024, 3: 2005, 4: 2015, 5: None})

    report = make_plan(by_period, workspace)

    assert [(one.name, one.num_images) for one in report.datasets] == [("newest", 2), ("oldest", 1)]
    drops = {row["path"]: row for row in read_parts(workspace.plan / "drops").to_pylist()}
    assert {path: row["reason"] for path, row in drops.items()} == {"4.jpg": "no_period", "5.jpg": "no_period"}
    assert "2015" in drops["4.jpg"]["detail"]
    assert "2 dropped: no_period" in report.summary()


def test_planning_again_does_nothing_and_a_dry_run_writes_nothing(by_period, workspace):
    write_kept(workspace, {1: 2022, 2: 2024})

    assert make_plan(by_period, workspace, dry_run=True).num_images == 2
    assert not workspace.plan.exists()

    assert not make_plan(by_period, workspace).is_unchanged
    first = (workspace.plan / "part-00000.parquet").read_bytes()
    assert make_plan(by_period, workspace).is_unchanged
    assert (workspace.plan / "part-00000.parquet").read_bytes() == first


def test_keys_that_vanish_from_a_sealed_chunk_are_reported(by_period, workspace):
    write_kept(workspace, {1: 2022, 2: 2023})
    make_plan(by_period, workspace)
    (workspace.chunks / "newest" / "0000").mkdir(parents=True)
    (workspace.chunks / "newest" / "0000" / "trained-by-r1").touch()
    write_kept(workspace, {2: 2023, 3: 2024}, made_from="later")

    report = make_plan(by_period, workspace)

    assert sealed_chunks(workspace) == {("newest", 0)}
    assert (report.num_vanished, report.first_vanished) == (1, (key_of(1),))
    assert (report.num_new, report.num_chunks) == (1, 2)


def test_a_key_that_is_kept_twice_is_refused(make_config, workspace):
    write_kept(workspace, {1: 2022})
    (workspace.kept / "part-00001.parquet").write_bytes((workspace.kept / "part-00000.parquet").read_bytes())

    with pytest.raises(ValueError, match="stands twice"):
        make_plan(make_config(), workspace)


def test_without_kept_records_planning_says_what_to_run(make_config, workspace):
    with pytest.raises(FileNotFoundError, match="sharding dedupe"):
        make_plan(make_config(), workspace)


def test_a_source_that_left_the_config_is_named(make_config, workspace):
    write_kept(workspace, {1: 2022}, source="gone")

    with pytest.raises(ValueError, match="'gone' is not in the config"):
        make_plan(make_config(), workspace)


def test_changed_rules_touch_only_what_no_run_has_trained(make_config, workspace):
    write_kept(workspace, dict.fromkeys(range(10), 2022))
    make_plan(make_config(plan={"chunk_size": 4}), workspace)
    seal = workspace.chunks / "photos" / "0001" / "trained-by-r1"
    seal.parent.mkdir(parents=True)
    seal.touch()

    report = make_plan(make_config(plan={"chunk_size": 4, "weights": [{"repeats": 3, "loss_weight": 0.5}]}), workspace)

    weights: dict[int, set] = {}
    for row in read_parts(workspace.plan).to_pylist():
        weights.setdefault(row["chunk"], set()).add((row["repeats"], row["loss_weight"]))
    assert weights == {0: {(3, 0.5)}, 1: {(1, 1.0)}, 2: {(3, 0.5)}}
    assert report.num_exposures == 22
    assert "22 exposures per epoch" in report.summary()


def test_relatives_of_what_is_held_out_are_dropped_with_the_reason(make_config, workspace):
    config = make_config(plan={"chunk_size": 4, "held_out": 2})
    write_kept(workspace, dict.fromkeys(range(20), 2022))
    make_plan(config, workspace)
    [first, _] = [row["key"] for row in read_parts(workspace.plan).to_pylist() if row["chunk"] == HELD_OUT]
    write_kept(workspace, dict.fromkeys(range(21), 2022), made_from="later")
    relatives = pa.Table.from_pylist([{"component": 7, "key": key} for key in (first, key_of(20))], schema=RELATIVES)
    write_part(workspace.dedupe / "relatives" / "part-00000.parquet", relatives, made_from="x")

    report = make_plan(config, workspace)

    [drop] = read_parts(workspace.plan / "drops").to_pylist()
    assert (drop["path"], drop["reason"], drop["kept_key"]) == ("20.jpg", "related_to_held_out", first)
    assert (report.num_held_out, report.num_images, report.num_new) == (2, 18, 0)
    assert "1 dropped: related_to_held_out" in report.summary()
