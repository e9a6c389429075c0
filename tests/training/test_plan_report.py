import json

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.chunk import ChunkError, list_chunks
from sharding.config import load_config
from sharding.schema import Workspace
from tests.training.toy import toy_config
from training.config import RunConfig
from training.inspect_run import PlanRefusedError, inspect_plan, plan_text
from training.latents.wanted import wanted_pictures
from training.plan_checks import check_captions
from training.plan_report import plan_report
from training.plan_totals import RunTotals, chunk_totals, run_totals
from training.plans import batch_plan

BUCKETS = {"resolution": [256, 256], "step": 64}


def config_of(**changes):
    return toy_config(**{"buckets": BUCKETS, "stage_c": {"encode_scale": 1.0}, "data": {"crop": "centre"}, **changes})


def make_index(rows):
    """rows: (width, height, repeats, loss weight)."""
    widths, heights, repeats, weights = zip(*rows, strict=True)
    return pa.table(
        {
            "key": [f"{row:04d}" for row in range(len(rows))],
            "width": list(widths),
            "height": list(heights),
            "repeats": list(repeats),
            "loss_weight": pa.array(weights, pa.float32()),
            "image_bytes": [1000] * len(rows),
            "mask_bytes": [10] * len(rows),
        }
    )


def totals_of(index, config, chunk="made/0000"):
    total = chunk_totals(index, chunk, config=config)
    per_epoch = (chunk, total.num_exposures // config.data.epochs)
    return RunTotals(
        1, config.data.epochs, config.data.epochs, total.num_samples, total.num_dropped, total.num_exposures,
        total.num_steps, total.read_bytes * config.data.epochs, total.latent_bytes, per_epoch, per_epoch,
    )  # fmt: skip


def report_of(index, config, **more):
    plan = batch_plan(index, "made/0000", config=config, epoch=0)
    return plan_report(plan, index, totals_of(index, config), config=config, **more)


MIXED = [(256, 256, 1, 1.0)] * 5 + [(300, 290, 2, 0.5), (1000, 200, 1, 1.0), (50, 400, 1, 1.0)]


def test_the_report_counts_images_fill_crop_exposures_and_bytes():
    report = report_of(make_index(MIXED), config_of(batch={"batch_size": 4, "micro_batch_size": 2}))
    text = report.text()

    square, small, wide, everything = report.rows
    assert (square.bucket, square.num_images, square.num_micro_batches, square.fill_fraction) == (
        "256x256",
        5,
        3,
        5 / 6,
    )
    assert (small.bucket, small.num_images, wide.bucket, everything.num_micro_batches) == ("192x192", 2, "320x64", 5)
    assert small.crop_loss_p99 == pytest.approx(1 - 192 / 199, abs=1e-3)
    assert everything.crop_loss_mean == pytest.approx(small.crop_loss_mean * 2 / 8)
    assert square.crop_loss_mean == everything.num_enlarged == 0
    assert report.num_steps == 3
    assert report.num_keys == 7
    assert report.dropped == {"below_bucket_step": (1, "0007 (50x400 has a side below 64)")}
    assert report.totals.read_bytes == 8 * 1010
    assert report.totals.latent_bytes == 2 * 16 * (5 * 8 * 8 + 6 * 6 + 10 * 2)
    assert "8 exposures of 7 samples (repeats at most 2, loss weight 0.5–1)" in text
    assert "left out: 1 as below_bucket_step, first 0007 (50x400 has a side below 64)" in text
    assert json.loads(json.dumps(report.values()))["rows"][0]["num_images"] == 5


def test_what_is_enlarged_is_counted_in_stored_pixels():
    index = make_index([(256, 256, 1, 1.0), (200, 200, 3, 1.0)])

    area = report_of(index, config_of(buckets={**BUCKETS, "family": "area", "min_side": 64}, batch={"batch_size": 2}))
    follows = report_of(index, config_of(batch={"batch_size": 2}))

    assert [row.num_enlarged for row in area.rows] == [3, 3]
    assert follows.rows[-1].num_enlarged == 0


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.sampled_from(MIXED), min_size=1, max_size=40),
    remainder=st.sampled_from(["short", "merge"]),
    family=st.sampled_from(["no_upscale", "area", "ratios", "long_side"]),
    micro_batch_size=st.integers(1, 4),
    epochs=st.integers(1, 4),
    turns=st.none() | st.lists(st.sampled_from([(1, 0), (2, 0), (2, 1), (3, 2)]), min_size=40, max_size=40),
)
def test_totals_are_those_of_the_real_plans(sizes, remainder, family, micro_batch_size, epochs, turns):
    index = make_index([(256, 256, 1, 1.0), *sizes])
    if turns is not None:
        every, offsets = zip((1, 0), *turns[: len(sizes)], strict=True)
        index = index.append_column("every_epochs", pa.array(every, pa.int32()))
        index = index.append_column("epoch_offset", pa.array(offsets, pa.int32()))
    config = config_of(
        batch={"micro_batch_size": micro_batch_size, "batch_size": 2 * micro_batch_size, "remainder": remainder},
        data={"epochs": epochs}, buckets={**BUCKETS, "family": family, "min_side": 64},
    )  # fmt: skip

    total = chunk_totals(index, "made/0000", config=config)

    plans = [batch_plan(index, "made/0000", config=config, epoch=epoch) for epoch in range(epochs)]
    assert total.num_steps == sum(len(plan.steps) for plan in plans)
    assert total.num_exposures == sum(plan.num_images for plan in plans)
    assert total.read_bytes == 1010 * total.num_exposures // epochs
    assert total.num_dropped == len(plans[0].drops)
    wanted = wanted_pictures(with_content(index), plans, with_flips=False, with_masks=False)
    if remainder == "short":
        buckets = [picture.placement.bucket for picture in wanted.pictures]
        assert total.latent_bytes == sum(16 * bucket.width * bucket.height // 32**2 * 2 for bucket in buckets)


def with_content(index):
    return index.append_column("sha256", index.column("key")).append_column("shard_sha256", index.column("key"))


TEN_STEPS = make_index([(256, 256, 1, 1.0)] * 40)


def findings(severity, **changes):
    processes = changes.pop("num_processes", None)
    config = config_of(**{"batch": {"batch_size": 4, "micro_batch_size": 2}, "save": {"every_steps": 5}, **changes})
    report = report_of(TEN_STEPS, config, num_processes=processes)
    return [finding.text for finding in report.findings if finding.severity == severity]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"schedule": {"name": "constant_with_warmup", "warmup_steps": 11}},
            "warmup_steps 11 is more than the run's 10",
        ),
        (
            {"schedule": {"name": "cosine", "warmup_steps": 1, "total_steps": 9}},
            "the last 1 would train with a learning",
        ),
        ({"batch": {"batch_size": 42, "micro_batch_size": 2}}, "batch_size 42 is more than the 40 exposures"),
    ],
)
def test_what_cannot_work_is_refused(changes, message):
    (text,) = findings("refused", **changes)

    assert message in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"save": {"every_steps": 11}}, "save.every_steps 11 never comes round in the run's 10 steps"),
        ({"save": {"every_steps": 5, "export_every_chunks": 2}}, "export_every_chunks 2 never comes round"),
        ({"schedule": {"name": "linear", "warmup_steps": 1, "total_steps": 20}}, "it ends before the learning rate"),
        ({"caption": {"token_warmup_steps": 50}}, "no caption is ever trained whole"),
        ({"num_processes": 3}, "3 processes, but a step has 2 micro-batches"),
        (
            {"num_processes": 3, "batch": {"batch_size": 8, "micro_batch_size": 2}},
            "3 processes share 4 micro-batches a step: 33% of all forwards are padding",
        ),
    ],
)
def test_what_only_looks_like_it_works_is_a_warning(changes, message):
    (text,) = findings("warning", **changes)

    assert message in text


def test_a_run_that_fits_has_no_findings():
    assert findings("warning", num_processes=2) == findings("refused") == []


def test_previews_that_never_come_are_named():
    preview = {"every_steps": 64, "prompts": [{"text": "a cat"}], "at_chunk_end": False}

    (text,) = findings("warning", preview=preview, stage_c={"previewer": "none"})

    assert "preview.every_steps 64 never comes round in the run's 10 steps: previews come never" in text


def test_plan_reads_a_workspace_and_refuses_with_all_reasons(run_toml):
    config = load_config(run_toml, RunConfig, [])
    wrong = load_config(
        run_toml, RunConfig, ["schedule.name=cosine", "schedule.warmup_steps=2", "schedule.total_steps=3",
                              "batch.batch_size=8", "data.epochs=9"],
    )  # fmt: skip

    report = inspect_plan(config, None, chunk_name="made/0001", num_processes=1)
    with pytest.raises(PlanRefusedError) as refused:
        plan_text(wrong, None, chunk_name=None)

    assert report is not None and (report.chunk, report.run.num_chunks, report.run.num_steps) == ("made/0001", 2, 2)
    assert report.totals.read_bytes == sum(
        chunk.read_index().column("image_bytes").to_numpy().sum()
        for chunk in list_chunks(Workspace(config.data.workspace).chunks) if chunk.name == "made/0001"
    )  # fmt: skip
    assert "batch.batch_size 8 is more than the 4 exposures" in str(refused.value)
    assert "schedule.total_steps 3 is less than the run's 18 steps" in str(refused.value)


def test_plan_without_a_chunk_says_so(run_toml, tmp_path):
    config = load_config(run_toml, RunConfig, [])

    with pytest.raises(ChunkError, match=r"not in this run's data\.chunks"):
        inspect_plan(config, None, chunk_name="made/0009")
    with pytest.raises(ChunkError, match="no chunk"):
        run_totals([], config=config)


def test_a_damaged_index_of_any_chunk_is_named(run_toml):
    config = load_config(run_toml, RunConfig, [])
    last = list_chunks(Workspace(config.data.workspace).chunks)[-1]
    last.index_path.write_bytes(b"no parquet")

    with pytest.raises(ChunkError, match=r"index-.*cannot be read .*sharding verify"):
        inspect_plan(config, None, chunk_name="made/0000")


def test_totals_of_a_chunk_of_which_nothing_fits_are_zero():
    config = config_of()
    index = make_index([(50, 400, 1, 1.0)])

    total = chunk_totals(index, "made/0000", config=config)

    assert (total.num_steps, total.num_exposures, total.num_dropped) == (0, 0, 1)
    assert total.latent_bytes == 0


def test_a_group_that_no_caption_has_is_a_warning():
    index = pa.table({"groups": [[{"group": "rest", "tags": ["sky"]}, {"group": "character", "tags": []}]]})

    (found,) = check_captions(index, config=config_of(caption={"keep_groups": ["rest", "character"]}))

    assert found.severity == "warning"
    assert "caption.keep_groups: 'character': no caption has a tag of this group; the captions have rest" in found.text
    assert check_captions(index, config=config_of(caption={"keep_groups": ["rest"]})) == ()
