import numpy as np
import pytest
from PIL import Image

from sharding.images import ImageError
from tests.training.toy import toy_config
from training.buckets import BucketError
from training.placement_picture import image_text

CONFIG = {"buckets": {"resolution": [256, 256]}, "stage_c": {"encode_scale": 1.0}}


def picture(path, width, height, **save):
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[:, :, 0] = np.linspace(0, 255, width)[None]
    ramp[:, :, 1] = 200
    Image.fromarray(ramp).save(path, **save)
    return path


def test_source_resize_crop_and_bucket_are_told_and_drawn(tmp_path):
    path = picture(tmp_path / "wide.png", 640, 360)

    text = image_text(toy_config(**CONFIG), path, output=tmp_path / "out" / "placed.png")

    assert text.splitlines() == [
        f"source   640x360  {path}",
        "resize   341x192  × 0.533",
        "crop     320x192 at 10,0, 6.2% cut off",
        "bucket   320x192  ratio 1.667, the picture's 1.778; latent 10x6; family no_upscale",
        f"picture  {tmp_path / 'out' / 'placed.png'}",
    ]
    drawn = np.asarray(Image.open(tmp_path / "out" / "placed.png"))
    assert drawn.shape == (192, 341 + 16 + 320, 3)
    assert tuple(drawn[96, 10]) == (255, 64, 64)  # the frame of the crop
    assert drawn[96, 5, 1] == 60 and drawn[96, 170, 1] == 200  # dark outside, as it is inside


def test_orientation_is_applied_and_enlarging_and_moving_crops_are_named(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = picture(tmp_path / "turned.jpg", 150, 100, exif=exif)
    config = toy_config(**CONFIG | {"buckets": {"resolution": [256, 256], "family": "area", "min_side": 64},
                                    "data": {"crop": "random"}})  # fmt: skip

    text = image_text(config, path)

    assert "source   100x150" in text
    assert "resize   213x320" in text and ": the picture is enlarged" in text
    assert "data.crop random moves it within 0–21,0–0" in text
    assert not list(tmp_path.glob("*.png"))


def test_what_has_no_bucket_or_is_no_picture_is_named(tmp_path):
    thin = picture(tmp_path / "thin.png", 600, 40)
    (tmp_path / "text.png").write_text("no picture")

    with pytest.raises(BucketError, match=r"below_bucket_step: .*thin\.png \(600x40\) has no bucket: 600x40"):
        image_text(toy_config(**CONFIG), thin)
    with pytest.raises(FileNotFoundError, match="no such picture"):
        image_text(toy_config(**CONFIG), tmp_path / "none.png")
    with pytest.raises(ImageError):
        image_text(toy_config(**CONFIG), tmp_path / "text.png")
