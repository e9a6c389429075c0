import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.batch_plan import MicroBatch, Step, make_batch_plan, rank_share
from training.buckets import Bucket, BucketSettings

ROOT = Path(__file__).parents[2]
SMALL = BucketSettings(resolution_area=256 * 256)
SIZES = [(256, 256), (320, 200), (200, 320), (300, 290), (900, 700), (400, 128), (130, 420)]


def make_index(rows):
    """rows: (key, width, height, repeats)."""
    keys, widths, heights, repeats = zip(*rows, strict=True)
    return pa.table(
        {
            "key": list(keys),
            "width": pa.array(widths, pa.int32()),
            "height": pa.array(heights, pa.int32()),
            "repeats": pa.array(repeats, pa.int32()),
            "loss_weight": pa.array([1.0] * len(keys), pa.float32()),
        }
    )


def make_plan(rows, **changes):
    values = {
        "bucket_settings": SMALL, "micro_batch_size": 4, "micro_batches_per_step": 3, "seed": 0, "epoch": 0,
        "chunk": "newest/0000",
    }  # fmt: skip
    return make_batch_plan(make_index(rows), **values | changes)


def showings(plan):
    return [
        (sample.key, sample.concept, sample.occurrence)
        for step in plan.steps
        for micro_batch in step.micro_batches
        for sample in micro_batch.samples
    ]


def many(num, repeats=1):
    return [(f"{number:016x}", *SIZES[number % len(SIZES)], repeats) for number in range(num)]


rows_strategy = st.lists(
    st.tuples(st.integers(0, 10**6), st.sampled_from(SIZES), st.integers(0, 3)),
    min_size=1,
    max_size=60,
    unique_by=lambda row: row[0],
).map(lambda rows: [("f" * 16, 256, 256, 1), *((f"{n:016x}", *size, repeats) for n, size, repeats in rows)])


@settings(max_examples=60, deadline=None)
@given(
    rows=rows_strategy,
    remainder=st.sampled_from(["short", "merge"]),
    size=st.integers(1, 6),
    per_step=st.integers(1, 5),
)
def test_every_showing_is_planned_exactly_once_in_a_fitting_bucket(rows, remainder, size, per_step):
    plan = make_plan(rows, remainder=remainder, micro_batch_size=size, micro_batches_per_step=per_step)

    expected = Counter((key, "", occurrence) for key, _, _, repeats in rows for occurrence in range(repeats))
    assert Counter(showings(plan)) == expected
    assert plan.num_images == sum(expected.values()) == sum(plan.images_per_bucket.values())
    assert [step.number for step in plan.steps] == list(range(len(plan.steps)))
    assert all(len(step.micro_batches) == per_step for step in plan.steps[:-1])
    for step in plan.steps:
        for micro_batch in step.micro_batches:
            assert 1 <= len(micro_batch.samples) <= size
            assert {placed.bucket for placed in micro_batch.placements} == {micro_batch.bucket}


@settings(max_examples=40, deadline=None)
@given(rows=rows_strategy, remainder=st.sampled_from(["short", "merge"]), order=st.randoms(use_true_random=False))
def test_the_row_order_of_the_index_does_not_matter(rows, remainder, order):
    shuffled = order.sample(rows, len(rows))

    plan, other = (make_plan(r, remainder=remainder) for r in (rows, shuffled))

    assert other.digest == plan.digest
    assert showings(other) == showings(plan)
    for row_list, made in ((rows, plan), (shuffled, other)):
        for step in made.steps:
            for micro_batch in step.micro_batches:
                assert all(row_list[sample.row][0] == sample.key for sample in micro_batch.samples)


@settings(max_examples=60, deadline=None)
@given(num_micro_batches=st.integers(1, 20), world_size=st.integers(1, 9))
def test_rank_shares_are_the_step_and_equally_long(num_micro_batches, world_size):
    step = Step(0, tuple(MicroBatch(Bucket(64 * (n + 1), 64), (), ()) for n in range(num_micro_batches)))

    shares = [rank_share(step, rank=rank, world_size=world_size) for rank in range(world_size)]

    assert {len(share) for share in shares} == {-(-num_micro_batches // world_size)}
    real = {entry.number: entry.micro_batch for share in shares for entry in share if not entry.is_padding}
    assert [real[number] for number in sorted(real)] == list(step.micro_batches)
    assert sum(not entry.is_padding for share in shares for entry in share) == num_micro_batches
    padding = [entry for share in shares for entry in share if entry.is_padding]
    assert all(entry.micro_batch is step.micro_batches[0] for entry in padding)
    assert all(entry.number >= num_micro_batches for entry in padding)


def test_the_digest_is_golden():
    """If this changes, plans of running chunks change: batches would differ after a resume."""
    plan = make_plan(many(40, repeats=2), remainder="merge", seed=3, epoch=1)

    assert plan.digest == "d96e8e83dfdce94205966ab246003c39ecb64fce1d2f501374c79136329e49a8"


def test_seed_epoch_chunk_and_sizes_change_the_plan():
    rows = many(40)
    changes = [
        {"seed": 1},
        {"epoch": 1},
        {"chunk": "newest/0001"},
        {"micro_batch_size": 5},
        {"micro_batches_per_step": 2},
    ]

    digests = {make_plan(rows).digest, *(make_plan(rows, **change).digest for change in changes)}

    assert len(digests) == 6
    assert make_plan(rows).digest in digests


def test_samples_of_different_periods_are_spread_over_the_epoch():
    plan = make_plan([(f"{n:016x}", 256, 256, 1) for n in range(400)])

    first_half = {key for key, _, _ in showings(plan)[:200]}

    assert 70 < sum(int(key, 16) < 200 for key in first_half) < 130


def test_short_keeps_remainders_as_smaller_micro_batches():
    plan = make_plan([(f"{n:x}", 256, 256, 1) for n in range(10)], micro_batches_per_step=2)

    sizes = sorted(len(m.samples) for step in plan.steps for m in step.micro_batches)
    assert sizes == [2, 4, 4]
    assert [len(step.micro_batches) for step in plan.steps] == [2, 1]
    assert sum(step.num_images for step in plan.steps) == 10


def test_merge_fills_places_within_the_bound_and_never_enlarges():
    squares = [(f"square{n}", 250, 250, 1) for n in range(3)]
    rows = [*squares, ("wide", 300, 200, 1), ("tiny", 192, 128, 1)]

    short = make_plan(rows)
    merged = make_plan(rows, remainder="merge", merge_max_crop_loss=0.3)
    strict = make_plan(rows, remainder="merge", merge_max_crop_loss=0.1)

    def buckets(plan):
        return {str(bucket): num for bucket, num in plan.images_per_bucket.items()}

    assert buckets(short) == {"192x192": 3, "192x128": 1, "256x192": 1}
    assert buckets(strict) == buckets(short)
    assert buckets(merged) == {"192x192": 4, "192x128": 1}  # the wide one; the tiny one would have to be enlarged
    for step in merged.steps:
        for micro_batch in step.micro_batches:
            for sample, placed in zip(micro_batch.samples, micro_batch.placements, strict=True):
                _, width, height, _ = rows[sample.row]
                assert placed.resized_width <= width
                assert placed.resized_height <= height


def test_an_image_without_a_bucket_is_dropped_with_a_reason():
    plan = make_plan([("a" * 16, 256, 256, 1), ("b" * 16, 50, 400, 2)])

    assert plan.num_images == 1
    assert [(drop.key, drop.reason) for drop in plan.drops] == [("b" * 16, "below_bucket_step")]


def test_a_concept_column_is_part_of_the_identity():
    index = make_index([("k", 256, 256, 1)] * 2).append_column("concept", [["cat", "dog"]])

    plan = make_batch_plan(
        index, bucket_settings=SMALL, micro_batch_size=2, micro_batches_per_step=1, seed=0, epoch=0, chunk="c/0000"
    )

    assert sorted(showings(plan)) == [("k", "cat", 0), ("k", "dog", 0)]


def test_each_repeat_is_a_showing_of_its_own_and_weights_come_along():
    index = make_index([("a", 256, 256, 3), ("b", 256, 256, 1)])
    index = index.set_column(4, "loss_weight", pa.array([0.5, 2.0], pa.float32()))

    plan = make_batch_plan(
        index, bucket_settings=SMALL, micro_batch_size=2, micro_batches_per_step=1, seed=0, epoch=0, chunk="c/0000"
    )

    samples = [sample for micro_batch in plan.micro_batches() for sample in micro_batch.samples]
    numbers = {sample.identity(seed=0, epoch=0, chunk="c/0000").digest("noise") for sample in samples}
    assert sorted((s.key, s.occurrence, s.loss_weight) for s in samples) == [
        ("a", 0, 0.5), ("a", 1, 0.5), ("a", 2, 0.5), ("b", 0, 2.0)
    ]  # fmt: skip
    assert len(numbers) == 4
    assert plan.digest != make_plan([("a", 256, 256, 3), ("b", 256, 256, 1)], micro_batch_size=2).digest


def test_the_plan_is_the_same_in_another_process_whatever_its_hash_seed():
    code = (
        "from tests.training.test_batch_plan import make_plan, many;"
        "print(make_plan(many(40, repeats=2), remainder='merge', seed=3, epoch=1).digest)"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, cwd=ROOT, capture_output=True,
            text=True, check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }  # fmt: skip

    assert digests == {make_plan(many(40, repeats=2), remainder="merge", seed=3, epoch=1).digest}


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([("a", 256, 256, 0)], {}, "newest/0000: none of its 1 samples"),
        ([("a", 256, 256, 1), ("a", 256, 256, 1)], {}, "key a stands twice"),
        ([("a", 256, 256, 1)], {"micro_batch_size": 0}, "micro_batch_size"),
        ([("a", 256, 256, -1)], {}, "key a has repeats -1 and loss_weight 1.0; neither may be negative"),
        ([("a", 256, 256, 1)], {"remainder": "drop"}, "short or merge, got 'drop'"),
    ],
)
def test_what_cannot_be_planned_is_refused(rows, changes, message):
    with pytest.raises(ValueError, match=message):
        make_plan(rows, **changes)


def test_a_rank_beyond_the_world_is_refused():
    with pytest.raises(ValueError, match="rank must be"):
        rank_share(make_plan(many(4)).steps[0], rank=2, world_size=2)


# --- samples that are shown in some epochs only ---

turns = st.integers(1, 4).flatmap(lambda every: st.tuples(st.just(every), st.integers(0, every - 1)))


def with_turns(index, turns_of_rows):
    every, offsets = zip(*turns_of_rows, strict=True)
    index = index.append_column("every_epochs", pa.array(every, pa.int32()))
    return index.append_column("epoch_offset", pa.array(offsets, pa.int32()))


@settings(max_examples=40, deadline=None)
@given(
    rows=rows_strategy,
    turns_of_rows=st.lists(turns, min_size=60, max_size=60),
    remainder=st.sampled_from(["short", "merge"]),
    epoch=st.integers(0, 13),
)
def test_an_epoch_shows_the_samples_whose_turn_it_is_and_no_others(rows, turns_of_rows, remainder, epoch):
    turns_of_rows = [(1, 0), *turns_of_rows][: len(rows)]
    values = {
        "bucket_settings": SMALL, "micro_batch_size": 3, "micro_batches_per_step": 2, "remainder": remainder,
        "seed": 0, "epoch": epoch, "chunk": "concepts/01-all",
    }  # fmt: skip

    plan = make_batch_plan(with_turns(make_index(rows), turns_of_rows), **values)

    shown = [row for row, (every, offset) in zip(rows, turns_of_rows, strict=True) if epoch % every == offset]
    assert plan.digest == make_batch_plan(make_index(shown), **values).digest
    assert Counter(showings(plan)) == Counter((key, "", n) for key, _, _, repeats in shown for n in range(repeats))
    for micro_batch in plan.micro_batches():
        assert all(rows[sample.row][0] == sample.key for sample in micro_batch.samples)


def test_samples_shown_in_every_epoch_give_the_plan_of_an_index_without_turns():
    index = make_index(many(40, repeats=2))

    values = {"micro_batch_size": 4, "micro_batches_per_step": 3, "seed": 3, "epoch": 1, "chunk": "newest/0000"}
    plans = [make_batch_plan(one, bucket_settings=SMALL, **values) for one in (index, with_turns(index, [(1, 0)] * 40))]

    assert plans[0].digest == plans[1].digest


@pytest.mark.parametrize("turn", [(0, 0), (2, 2), (3, -1), (-1, -2)])
def test_turns_that_never_come_are_refused(turn):
    index = with_turns(make_index([("a", 256, 256, 1), ("b", 256, 256, 1)]), [(1, 0), turn])

    with pytest.raises(ValueError, match=f"key b has every_epochs {turn[0]} and epoch_offset {turn[1]}"):
        make_batch_plan(
            index, bucket_settings=SMALL, micro_batch_size=1, micro_batches_per_step=1, seed=0, epoch=0, chunk="c/0"
        )


def test_an_epoch_in_which_nothing_is_shown_says_so():
    index = with_turns(make_index([("a", 256, 256, 1)]), [(2, 1)])

    with pytest.raises(ValueError, match="none of its 1 samples can be trained in epoch 0"):
        make_batch_plan(
            index, bucket_settings=SMALL, micro_batch_size=1, micro_batches_per_step=1, seed=0, epoch=0, chunk="c/0"
        )
