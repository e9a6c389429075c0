"""The tables of a model card with 5.6 million images come out when its counts are put in."""

import resource
import time
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pytest

from sharding.report import make_report
from sharding.reporting.html import render_html
from sharding.reporting.tables import report_tables
from sharding.schema import CAPTIONS, PLAN, TAG_GROUP
from sharding.tables import part_name, write_part

IMAGES = {
    "newest": 1_848_331, "recent": 1_380_630, "mid": 993_227, "early": 566_152, "oldest": 160_397, "pixiv": 343_614,
    "visual novel cg": 231_358, "anime wallpaper": 104_790,
}  # fmt: skip
CHUNKS = dict(zip(IMAGES, (232, 173, 125, 71, 21, 43, 29, 14), strict=True))
AESTHETIC = {
    "extremely aesthetic": 125_451, "very aesthetic": 887_382, "aesthetic": 1_049_857, "slightly aesthetic": 1_643_091,
    "not displeasing": 569_543, "not aesthetic": 445_188, "slightly displeasing": 341_424, "displeasing": 237_660,
    "very displeasing": 328_712,
}  # fmt: skip
QUALITY = {
    "best quality": 1_270_447, "high quality": 498_244, "great quality": 351_006, "medium quality": 366_448,
    "normal quality": 368_380, "bad quality": 279_050, "low quality": 538_958, "worst quality": 1_955_966,
}  # fmt: skip
RATING = {"general": 1_416_451, "sensitive": 3_447_664, "nsfw": 427_459, "explicit nsfw": 336_925}
PERIODS = {"newest": [2022, 2024], "recent": [2019, 2021], "mid": [2015, 2018], "early": [2011, 2014],
           "oldest": [2005, 2010]}  # fmt: skip
STEPS = (0.90, 0.80, 0.70, 0.50, 0.40, 0.30, 0.20, 0.10)
PART_ROWS = 1 << 20


def keys_of(numbers: np.ndarray) -> pa.Array:
    """Return 16 hex digits for each number, well mixed."""
    digits = np.array([f"{byte:02x}".encode() for byte in range(256)])
    mixed = (numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)).astype(">u8")
    text = digits[mixed.view(np.uint8).reshape(-1, 8)].view("S16").ravel()
    return pa.array(text).cast(pa.binary()).cast(pa.string())


def words_of(counts: Mapping[str, int], total: int, *, seed: int) -> np.ndarray:
    """Return a shuffled word number for each image; -1 for those that have none."""
    numbers = np.repeat(np.arange(len(counts), dtype=np.int8), list(counts.values()))
    numbers = np.append(numbers, np.full(total - len(numbers), -1, dtype=np.int8))
    return np.random.default_rng(seed).permutation(numbers)


def write_plan(workspace, images: Mapping[str, int], chunk_size: int) -> None:
    start = 0
    for part, (name, count) in enumerate(images.items()):
        place = np.arange(count)
        columns = {
            "key": keys_of(place + start),
            "dataset": pa.DictionaryArray.from_arrays(np.zeros(count, np.int32), [name]).cast(pa.string()),
            "period": pa.DictionaryArray.from_arrays(np.zeros(count, np.int32), [name if name in PERIODS else ""]).cast(
                pa.string()
            ),
            "chunk": pa.array(place // chunk_size, pa.int32()),
            "position": pa.array(place % chunk_size, pa.int32()),
            "repeats": pa.array(np.ones(count), pa.int32()),
            "loss_weight": pa.array(np.ones(count), pa.float32()),
        }
        write_part(workspace.plan / part_name(part), pa.table(columns, schema=PLAN), made_from="x")
        start += count


def write_captions(workspace, words: Mapping[str, Mapping[str, int]], total: int) -> None:
    numbers = {group: words_of(counts, total, seed=place) for place, (group, counts) in enumerate(words.items())}
    for part, start in enumerate(range(0, total, PART_ROWS)):
        stop = min(start + PART_ROWS, total)
        places = np.stack([column[start:stop] for column in numbers.values()], axis=1)
        has_word = places >= 0
        offsets = np.append(0, np.cumsum(has_word.sum(axis=1)))
        vocabulary = [word for counts in words.values() for word in counts]
        first = np.append(0, np.cumsum([len(counts) for counts in words.values()]))[:-1]
        chosen = pa.array(vocabulary).take(pa.array((places + first)[has_word]))
        group = np.broadcast_to(np.arange(len(words)), places.shape)[has_word]
        names = pa.array(list(words)).take(pa.array(group))
        tags = pa.ListArray.from_arrays(pa.array(np.arange(len(chosen) + 1), pa.int32()), chosen)
        entries = pa.StructArray.from_arrays([names, tags], fields=list(TAG_GROUP))
        columns = [
            keys_of(np.arange(start, stop)),
            pa.array([""]).take(pa.array(np.zeros(stop - start, np.int8))),
            pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), entries),
        ]
        table = pa.Table.from_arrays(columns, schema=CAPTIONS)
        write_part(workspace.captions("default") / part_name(part), table, made_from="x")


def make_seed_config(make_config, tmp_path):
    def tier(model, words, steps):
        return {"model": model, "comparison": ">", "rest": list(words)[-1],
                "steps": [list(step) for step in zip(steps, words, strict=False)]}  # fmt: skip

    root = str(tmp_path)
    return make_config(
        sources={
            "boards": {"root": root, "dataset": "{period}"},
            **{name: {"root": root} for name in ("pixiv", "visual novel cg", "anime wallpaper")},
        },
        periods=PERIODS,
        policies={
            "default": {
                "groups": ["aesthetic", "quality", "rating"],
                "tiers": {
                    "aesthetic": tier("aesthetic-shadow", AESTHETIC, STEPS),
                    "quality": tier("aes-b32", QUALITY, (0.980, 0.900, 0.750, 0.500, 0.250, 0.125, 0.025)),
                },
            }
        },
    )


def check_tables(report, images, words, *, in_last: int, without: int) -> None:
    tables = {table.name: table for table in report_tables(report)}
    total = sum(images.values())
    assert [row[:3] for row in tables["datasets"].rows] == [
        (name, f"{images[name]:,}", f"{CHUNKS[name]}") for name in images
    ]
    assert tables["datasets"].total[:3] == ("Total", f"{total:,}", "708")
    assert tables["datasets"].rows[0][3] == str(in_last)
    assert [row[:2] for row in tables["periods"].rows[:2]] == [("newest", "2022 to 2024"), ("recent", "2019 to 2021")]
    steps = [*(f"{step:.2f}" for step in STEPS), "rest of them"]
    assert tables["words of aesthetic"].rows == (
        *((step, word, f"{count:,}") for step, (word, count) in zip(steps, words["aesthetic"].items(), strict=True)),
        ("", "no aesthetic tag", str(without)),
    )
    assert tables["words of quality"].rows[0] == ("0.980", "best quality", f"{words['quality']['best quality']:,}")
    assert tables["words of rating"].rows == tuple((word, f"{count:,}") for word, count in words["rating"].items())
    assert sum(int(number) for _, number, _, _ in tables["chunks"].rows) == len(report.chunks) == 708
    page = render_html(report)
    assert f"{without:,} images have no aesthetic tag" in page and 'class="missing"' in page
    for count in (*images.values(), *words["aesthetic"].values(), *words["quality"].values()):
        assert f"{count:,}</td>" in page


def test_the_cards_tables_in_hundredths(make_config, workspace, tmp_path):
    images = {name: round(count / 100) for name, count in IMAGES.items()}
    total = sum(images.values())
    words = {
        "aesthetic": scaled(AESTHETIC, total - 2),
        "quality": scaled(QUALITY, total),
        "rating": scaled(RATING, total),
    }
    write_plan(workspace, images, chunk_size=80)
    write_captions(workspace, words, total)

    report = make_report(make_seed_config(make_config, tmp_path), workspace)

    check_tables(report, images, words, in_last=3, without=2)


def scaled(counts: Mapping[str, int], total: int) -> dict[str, int]:
    """Return counts that sum to `total` in about the same proportions."""
    small = {word: count * total // sum(counts.values()) for word, count in counts.items()}
    return small | {(last := list(small)[-1]): small[last] + total - sum(small.values())}


@pytest.mark.slow
def test_the_cards_tables_at_full_size(make_config, workspace, tmp_path):
    words = {"aesthetic": AESTHETIC, "quality": QUALITY, "rating": RATING}
    write_plan(workspace, IMAGES, chunk_size=8_000)
    write_captions(workspace, words, sum(IMAGES.values()))
    started = time.monotonic()

    report = make_report(make_seed_config(make_config, tmp_path), workspace)

    print(f"{time.monotonic() - started:.1f} s, {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")
    check_tables(report, IMAGES, words, in_last=331, without=191)
