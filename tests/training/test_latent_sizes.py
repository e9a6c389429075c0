"""What the settings make of a picture's size, and previews that show something else than is trained."""

import pyarrow as pa
import pytest

from tests.training.toy import toy_config
from training.latent_sizes import check_previews, decoded_size, density_text, latent_side, previews_text
from training.plan_report import plan_report
from training.plan_totals import RunTotals
from training.plans import batch_plan


def config_of(encode_scale, *prompts, **stage_c):
    return toy_config(
        preview={"prompts": list(prompts)}, buckets={"resolution": [1024, 1024]},
        stage_c={"encode_scale": encode_scale, "previewer": "none", **stage_c},
    )  # fmt: skip


def plan_of(config, sizes=((1024, 1024), (1400, 700))):
    index = pa.table(
        {
            "key": [f"{row}" for row in range(len(sizes))], "width": [size[0] for size in sizes],
            "height": [size[1] for size in sizes], "repeats": [1] * len(sizes), "loss_weight": [1.0] * len(sizes),
            "image_bytes": [1000] * len(sizes), "mask_bytes": [0] * len(sizes),
        }
    )  # fmt: skip
    return batch_plan(index, "made/0000", config=config, epoch=0), index


def warnings(config):
    plan, _ = plan_of(config)
    return [finding.text for finding in check_previews(plan, config.preview.prompts, config=config)]


@pytest.mark.parametrize(
    ("pixels", "scale", "latents"), [(1024, 0.75, 24), (1024, 1, 32), (1000, 0.75, 24), (832, 0.75, 20), (128, 0.75, 3)]
)
def test_a_side_in_latents_is_that_of_the_references(pixels, scale, latents):
    assert latent_side(pixels, scale) == latents


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (0.75, ["1024x1024 → 768x768 pixels in the encoder", "0.75) → 24x24 latents → 1024x1024 pixels when decoded"]),
        (1.0, ["1024x1024 → 1024x1024 pixels in the encoder", "1) → 32x32 latents → 1365x1365 pixels when decoded"]),
    ],
)
def test_the_plan_says_what_becomes_of_the_resolution(scale, expected):
    config = config_of(scale, {"text": "a"}, {"text": "b", "width": 1536}, {"text": "c"})
    plan, index = plan_of(config)
    totals = RunTotals(1, 1, 1, 2, 0, 2, 1, 2000, 1, ("made/0000", 2), ("made/0000", 2))

    report = plan_report(plan, index, totals, config=config, prompts=config.preview.prompts)

    for part in expected:
        assert part in density_text(config) and part in report.text()
    row = next(row for row in report.rows if row.picture == "1024x1024")
    assert (row.bucket, row.latent) == (("768x768", "24x24") if scale == 0.75 else ("1024x1024", "32x32"))
    side, wide = (24, 36) if scale == 0.75 else (32, 48)
    assert previews_text(config.preview.prompts, config) == (
        f"previews: 1024x1024 as {side}x{side} latents, 1536x1024 as {wide}x{side} latents"
    )
    assert report.rows[-1].latent == ""


def test_previews_of_another_density_window_or_mask_are_warned_of():
    as_kohya = {"text": "1girl", "encode_scale": 0.75, "max_tokens": 75, "attention_mask": True}

    found = warnings(config_of(1.0, {"text": "same"}, as_kohya, max_tokens=225, attention_mask=False))

    assert [text.split(" (")[0] for text in found] == ["preview 1"] * 3
    assert "has encode_scale 0.75, training 1: it is drawn with 24x24 latents, and trained with 32x32" in found[0]
    assert "has max_tokens 75, training 225" in found[1]
    assert "has attention_mask true, training false" in found[2]


def test_previews_of_a_size_that_is_not_trained_are_warned_of():
    (large,) = warnings(config_of(0.75, {"text": "a"}, {"text": "poster", "width": 2048, "height": 1024}))
    (small,) = warnings(config_of(0.75, {"text": "stamp", "width": 512, "height": 512}))

    assert "preview 1 ('poster') is drawn with 48x24 latents, but this chunk's buckets have" in large
    assert "'stamp') is drawn with 12x12 latents" in small
    assert warnings(config_of(0.75)) == []


@pytest.mark.parametrize(("scale", "expected"), [(0.75, (1024, 1024)), (1.0, (1365, 1365)), (0.5, (683, 683))])
def test_other_programs_draw_the_trained_latents_in_another_size_unless_the_scale_is_three_quarters(scale, expected):
    assert decoded_size(config_of(scale)) == expected
