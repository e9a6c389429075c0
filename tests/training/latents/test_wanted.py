from dataclasses import replace

import pyarrow as pa
import pytest

from tests.training.chunks import make_plan
from training.caption_text import CaptionSettings
from training.latents.wanted import in_batches, wanted_captions, wanted_pictures


@pytest.fixture
def index(chunk):
    return chunk.read_index()


def pictures_of(index, plans, **changes):
    return wanted_pictures(index, plans, **{"with_flips": False, "with_masks": False} | changes)


def test_each_picture_is_wanted_once_however_often_it_is_shown(chunk, index):
    plans = [make_plan(chunk, epoch=epoch) for epoch in range(3)]

    wanted = pictures_of(index, plans)

    assert [one.row for one in wanted.pictures] == list(range(24))
    assert wanted.digest == pictures_of(index, plans[:1]).digest


def test_a_picture_that_moves_to_another_bucket_is_wanted_at_each_place(chunk, index):
    plans = [make_plan(chunk, epoch=epoch, remainder="merge", merge_max_crop_loss=0.5, micro_batch_size=5)
             for epoch in range(4)]  # fmt: skip

    places = [(one.key, one.placement) for one in pictures_of(index, plans).pictures]

    shown = {
        (sample.key, placed)
        for plan in plans
        for micro_batch in plan.micro_batches()
        for sample, placed in zip(micro_batch.samples, micro_batch.placements, strict=True)
    }
    assert len(places) == len(set(places)) > 24
    assert set(places) == shown


def test_the_digest_follows_pixels_sizes_flips_and_masks_that_matter_but_no_caption(chunk, index):
    plans = [make_plan(chunk)]
    digest = pictures_of(index, plans).digest

    def changed(name, row, value):
        column = index.column(name).to_pylist()
        column[row] = value
        at = index.column_names.index(name)
        return index.set_column(at, index.schema.field(name), pa.array(column, index.schema.field(name).type))

    assert pictures_of(changed("caption", 0, "other"), plans).digest == digest
    assert pictures_of(changed("sha256", 0, "0" * 64), plans).digest != digest
    assert pictures_of(index, plans, with_flips=True).digest != digest
    assert pictures_of(changed("shard_sha256", 3, "0"), plans).digest == digest
    masked = pictures_of(index, plans, with_masks=True).digest
    assert pictures_of(changed("shard_sha256", 3, "0"), plans, with_masks=True).digest != masked
    assert pictures_of(changed("shard_sha256", 4, "0"), plans, with_masks=True).digest == masked


def test_parts_hold_each_picture_once_and_batches_one_bucket_each(chunk, index, encoders):
    wanted = pictures_of(index, [make_plan(chunk)])

    parts = [wanted.part(number) for number in range(wanted.num_parts)]
    batches = [batch for part in parts for batch in in_batches(part, 2)]

    assert [len(part) for part in parts] == [5, 5, 5, 5, 4]
    assert sorted(sample.row for batch in batches for sample in batch.samples) == list(range(24))
    assert all(placed.bucket == batch.bucket for batch in batches for placed in batch.placements)
    assert {len(batch.samples) for batch in batches} == {1, 2}


def test_captions_are_wanted_once_as_they_are_trained(chunk, index):
    rows = index.column("caption").to_pylist()
    at = index.column_names.index("caption")
    doubled = index.set_column(at, "caption", pa.array(rows[:1] * 4 + rows[4:]))
    settings = CaptionSettings(prefix="photo")

    wanted = wanted_captions(doubled, [make_plan(chunk)], settings=settings)

    assert wanted.captions == tuple(f"photo {caption}" for caption in rows[:1] + rows[4:])
    assert wanted.digest != wanted_captions(doubled, [make_plan(chunk)], settings=replace(settings, prefix="")).digest
