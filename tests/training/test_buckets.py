import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.buckets import (
    Bucket,
    BucketError,
    BucketSettings,
    listed_buckets,
    nearest_bucket,
    placement,
    placement_in,
)

NO_UPSCALE = BucketSettings()
sides = st.integers(64, 6000)


@pytest.mark.parametrize(
    ("size", "bucket", "resized"),
    [
        ((1280, 600), (1280, 576), (1280, 600)),
        ((1920, 1080), (1344, 768), (1365, 768)),
        ((1200, 1600), (832, 1088), (832, 1109)),
        ((2048, 2048), (1024, 1024), (1024, 1024)),
        ((1000, 1000), (960, 960), (1000, 1000)),
        ((3000, 500), (2304, 384), (2304, 384)),
    ],
)
def test_no_upscale_follows_the_seeds_rule(size, bucket, resized):
    placed = placement(*size, settings=NO_UPSCALE)

    assert placed.bucket == Bucket(*bucket)
    assert (placed.resized_width, placed.resized_height) == resized
    assert placed.crop_loss_fraction == pytest.approx(1 - bucket[0] * bucket[1] / (resized[0] * resized[1]))


@pytest.mark.parametrize("size", [(63, 900), (900, 63), (0, 5), (200_000, 100), (64, 1_000_000)])
def test_an_image_below_a_step_has_no_bucket_and_says_why(size):
    with pytest.raises(BucketError) as caught:
        placement(*size, settings=NO_UPSCALE)

    assert caught.value.reason == "below_bucket_step"
    assert "below_bucket_step: " in str(caught.value)


@given(width=sides, height=sides)
def test_no_upscale_never_enlarges_and_always_covers(width, height):
    try:
        placed = placement(width, height, settings=NO_UPSCALE)
    except BucketError:
        assert min(width, height) / max(width, height) < 64 / 1024
        return

    bucket = placed.bucket
    assert bucket.width % 64 == bucket.height % 64 == 0
    assert bucket.width * bucket.height <= NO_UPSCALE.resolution_area * 1.05
    assert bucket.width <= placed.resized_width <= width
    assert bucket.height <= placed.resized_height <= height
    assert 0 <= placed.crop_loss_fraction < 1


@given(width=sides, height=sides, family=st.sampled_from(["area", "ratios", "long_side"]))
def test_listed_families_cover_the_nearest_bucket(width, height, family):
    settings = BucketSettings(family=family, step=32)

    placed = placement(width, height, settings=settings)

    buckets = listed_buckets(settings)
    exact = Bucket(width, height)
    assert placed.bucket == (exact if exact in buckets else nearest_bucket(width, height, buckets))
    assert placed.resized_width >= placed.bucket.width
    assert placed.resized_height >= placed.bucket.height
    assert placed.resized_width == placed.bucket.width or placed.resized_height == placed.bucket.height


def test_area_lists_sizes_of_one_area_both_ways_round():
    buckets = listed_buckets(BucketSettings(family="area", min_side=512, max_side=2048))

    assert Bucket(1024, 1024) in buckets
    assert Bucket(1344, 768) in buckets
    assert Bucket(2048, 512) in buckets
    assert {Bucket(b.height, b.width) for b in buckets} == set(buckets)
    assert all(512 <= min(b.width, b.height) <= max(b.width, b.height) <= 2048 for b in buckets)
    assert all(b.width * b.height <= 1024 * 1024 for b in buckets)


def test_area_enlarges_and_takes_an_exact_size_as_it_is():
    settings = BucketSettings(family="area")

    assert placement(512, 512, settings=settings).resized_width == 1024
    assert placement(1344, 768, settings=settings).crop_loss_fraction == 0


def test_ratios_are_the_official_list_at_768():
    settings = BucketSettings(family="ratios", resolution_area=768 * 768, step=32)

    buckets = listed_buckets(settings)

    assert len(buckets) == 21  # 12 ratios and 11 inverses; 4:5 and 5:6 fall on the same size
    assert {Bucket(768, 768), Bucket(1056, 512), Bucket(512, 1056), Bucket(1024, 576), Bucket(1856, 288)} <= set(
        buckets
    )


def test_one_ratio_is_the_plain_square():
    settings = BucketSettings(family="ratios", ratios=(1.0,))

    assert listed_buckets(settings) == (Bucket(1024, 1024),)
    assert placement(2000, 1000, settings=settings).crop_loss_fraction == 0.5


def test_long_side_is_the_table_of_the_dreambooth_wiki():
    """Anime4000's "Valid Resolution": 1:1, 7:8, 3:4, 5:8, 1:2, made for crops of 1080p screenshots."""
    settings = BucketSettings(family="long_side", resolution_area=512 * 512)

    upright = [b for b in listed_buckets(settings) if b.height == 512]

    assert upright == [Bucket(width, 512) for width in (256, 320, 384, 448, 512)]
    assert len(listed_buckets(settings)) == 9
    for width, bucket_width in ((1080, 512), (945, 448), (810, 384), (675, 320), (540, 256)):
        placed = placement(width, 1080, settings=settings)
        assert (placed.bucket, placed.crop_loss_fraction) == (Bucket(bucket_width, 512), 0)


def test_long_side_of_another_size_has_the_same_ratios_with_a_step_of_an_eighth():
    settings = BucketSettings(family="long_side", resolution_area=1, long_side=1000, step=1)
    eighths = BucketSettings(family="long_side", resolution_area=768 * 1024, long_side=1024, step=128)

    assert [b.width for b in listed_buckets(eighths) if b.height == 1024] == [512, 640, 768, 896, 1024]
    assert min(b.width for b in listed_buckets(settings)) == 500
    assert placement(300, 300, settings=settings).resized_width == 1000  # enlarged, as in the extension


def test_no_upscale_honours_bounds_that_kohya_ignores():
    bounded = BucketSettings(min_side=512, max_side=1536)

    long = placement(6000, 2400, settings=bounded)

    assert placement(6000, 2400, settings=NO_UPSCALE).bucket == Bucket(1600, 640)
    assert long.bucket == Bucket(1408, 576)
    assert long.resized_width <= 1536
    with pytest.raises(BucketError, match=r"below_min_side: .* has a side below 512"):
        placement(3000, 500, settings=bounded)


@given(width=sides, height=sides, min_side=st.integers(64, 1024), max_side=st.integers(1024, 3000))
def test_no_bucket_is_outside_the_bounds(width, height, min_side, max_side):
    for family in ("no_upscale", "area", "ratios", "long_side"):
        settings = BucketSettings(family=family, min_side=min_side, max_side=max_side)
        try:
            bucket = placement(width, height, settings=settings).bucket
        except BucketError as error:
            assert family == "no_upscale" and error.reason in ("below_min_side", "below_bucket_step")
            continue
        assert min_side <= min(bucket.width, bucket.height) <= max(bucket.width, bucket.height) <= max_side


def test_two_to_one_and_one_to_two_are_equally_far_from_square():
    buckets = [Bucket(512, 512), Bucket(1024, 256), Bucket(256, 1024)]

    assert nearest_bucket(300, 200, buckets) == Bucket(512, 512)
    assert nearest_bucket(900, 200, buckets) == Bucket(1024, 256)
    assert nearest_bucket(200, 900, buckets) == Bucket(256, 1024)
    assert nearest_bucket(10, 10, [Bucket(64, 64), Bucket(128, 128)]) == Bucket(128, 128)
    with pytest.raises(ValueError, match="no buckets"):
        nearest_bucket(1, 1, [])


def test_placement_in_another_bucket_costs_crop():
    placed = placement_in(1280, 720, Bucket(640, 640))

    assert (placed.resized_width, placed.resized_height) == (1138, 640)
    assert placed.crop_loss_fraction == pytest.approx(1 - 640 / 1138)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"family": "square"}, "no_upscale, area, ratios, long_side"),
        ({"step": 0}, "buckets.step"),
        ({"resolution_area": 100}, "buckets.resolution_area"),
        ({"family": "area", "min_side": 2000}, "buckets.min_side"),
        ({"family": "area", "max_side": 512}, "buckets.max_side"),
        ({"family": "ratios", "ratios": ()}, "buckets.ratios"),
        ({"family": "ratios", "ratios": (float("inf"),)}, "buckets.ratios"),
        (
            {"min_side": 1025},
            r"buckets.min_side \(1025\) must lie between buckets.step \(64\) and the side of a square",
        ),
        ({"max_side": 1000}, r"buckets.max_side \(1000\) must be at least"),
        ({"family": "long_side", "long_side": 500, "min_side": 512}, r"the long side \(500\)"),
        (
            {"family": "ratios", "ratios": (4.0,), "min_side": 1024},
            "no size of family 'ratios' has sides of 1024 to inf",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        BucketSettings(**values)
