"""The WD tagger: pre-processing, label file, probabilities, provider."""

import io

import numpy as np
import pytest
from PIL import Image

from captioning.onnx_session import open_session, require_provider
from captioning.plugin import ModelError
from captioning.taggers import wd
from captioning.taggers.base import Label, rating_columns, tagger_rows
from captioning.taggers.labels import read_selected_tags
from captioning.taggers.square import SquarePreparer
from sharding.images import decode_rgb


def square_by_hand(image, side):
    """Pad with numpy, resize with Pillow, reverse the channels: the author's demo written another way."""
    array = np.asarray(image)
    height, width, _ = array.shape
    longest = max(height, width)
    top, left = (longest - height) // 2, (longest - width) // 2
    rows, columns = (top, longest - height - top), (left, longest - width - left)
    padded = np.pad(array, (rows, columns, (0, 0)), constant_values=255)
    resized = Image.fromarray(padded).resize((side, side), Image.BICUBIC) if longest != side else padded
    return np.asarray(resized)[..., ::-1]


@pytest.mark.parametrize(
    "size",
    [
        (64, 64),
        (640, 480),
        (301, 402),
        (1, 1),
        (3, 900),
        (2000, 550),
        (550, 2000),
        (64, 33),
        (33, 64),
        (65, 64),
        (1999, 1000),
    ],
)
def test_pixels_are_those_of_the_authors_demo(lab, size):
    image = decode_rgb(lab.png(*size, seed=size[0]))

    pixels = SquarePreparer(64).prepare(image)

    assert pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, square_by_hand(image, 64))


def test_channels_are_blue_green_red_and_padding_is_white_with_the_odd_pixel_at_the_end():
    pixels = SquarePreparer(4).prepare(Image.new("RGB", (4, 1), (255, 0, 7)))

    assert pixels[1].tolist() == [[7, 0, 255]] * 4
    assert (pixels[[0, 2, 3]] == 255).all()


def test_transparent_pixels_are_white_for_the_tagger():
    image = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")

    assert (SquarePreparer(8).prepare(decode_rgb(buffer.getvalue())) == 255).all()


def test_probabilities_are_the_networks_own_output_on_raw_bgr_floats(lab, demo_models):
    import onnx
    from onnx import numpy_helper

    model = wd.load(wd.Settings(kind="wd_tagger", model=str(demo_models["wd"]), floor=0.0), device="cpu")
    pixels = np.stack([model.preparer.prepare(decode_rgb(lab.png(200, 100, seed=n))) for n in range(3)])
    weights = {
        it.name: numpy_helper.to_array(it) for it in onnx.load(demo_models["wd"] / "model.onnx").graph.initializer
    }

    rows = model.predict(pixels)

    for picture, row in zip(pixels.astype(np.float64), rows, strict=True):
        grid = (picture / 127.5 - 1).reshape(8, 8, 8, 8, 3).mean(axis=(1, 3)).transpose(2, 0, 1).ravel()
        expected = 1 / (1 + np.exp(-(grid @ weights["weights"] + weights["biases"])))
        np.testing.assert_allclose(row["rating_probs"] + row["tag_probs"], expected, atol=1e-5)
        assert row["tag_ids"] == list(range(4, len(expected)))


def test_only_probabilities_of_at_least_the_floor_are_stored():
    probs = np.array([[0.1, 0.2, 0.3, 0.4, 0.05, 0.0499, 0.9]], dtype=np.float32)

    rows = tagger_rows(probs, rating_ids=[0, 1, 2, 3], tag_ids=np.arange(4, 7, dtype=np.int32), floor=0.05)

    assert rows[0]["tag_ids"] == [4, 6] and rows[0]["status"] == "ok"
    assert rows[0]["rating_probs"] == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_a_probability_that_is_not_finite_is_no_result():
    probs = np.array([[0.5, np.nan], [0.5, 0.5]], dtype=np.float32)

    rows = tagger_rows(probs, rating_ids=[], tag_ids=np.arange(2, dtype=np.int32), floor=0.05)

    assert [row["status"] for row in rows] == ["not_finite", "ok"] and rows[0]["tag_ids"] == []


def test_tags_that_look_like_missing_values_are_words(tmp_path):
    path = tmp_path / "selected_tags.csv"
    path.write_text('tag_id,name,category,count\n1,null,0,5\n2,"nan",0,4\n3,"a,b",4,3\n4,general,9,2\n')

    labels = read_selected_tags(path)

    assert labels == [
        Label("null", "general"),
        Label("nan", "general"),
        Label("a,b", "character"),
        Label("general", "rating"),
    ]


def test_ratings_are_found_by_name_in_any_order():
    labels = [Label(name, "rating") for name in ("explicit", "general", "questionable", "sensitive")]

    assert rating_columns(labels) == [1, 3, 2, 0]
    assert rating_columns([Label("1girl", "general")]) == []


def test_a_label_file_of_another_model_is_an_error(tmp_path, demo_models):
    lines = (demo_models["wd"] / "selected_tags.csv").read_text().splitlines()
    (tmp_path / "selected_tags.csv").write_text("\n".join(lines[:-1]) + "\n")
    (tmp_path / "model.onnx").write_bytes((demo_models["wd"] / "model.onnx").read_bytes())

    with pytest.raises(ModelError, match="do not belong together"):
        wd.load(wd.Settings(kind="wd_tagger", model=str(tmp_path)), device="cpu")


def test_a_device_without_its_provider_is_an_error_and_no_silent_cpu_run(demo_models):
    with pytest.raises(ModelError, match="CUDAExecutionProvider"):
        open_session(demo_models["wd"] / "model.onnx", "cuda")
    with pytest.raises(ModelError, match="uses CPUExecutionProvider instead"):
        require_provider(["CPUExecutionProvider"], "CUDAExecutionProvider", path=demo_models["wd"])


def test_a_missing_model_folder_says_where_it_was_looked_for():
    with pytest.raises(ModelError, match="model = 'no/such/folder': no such folder"):
        wd.identify(wd.Settings(kind="wd_tagger", model="no/such/folder"))


def test_the_identity_does_not_depend_on_where_the_model_lies(tmp_path, demo_models):
    for name in ("model.onnx", "selected_tags.csv"):
        (tmp_path / name).write_bytes((demo_models["wd"] / name).read_bytes())
    here = wd.identify(wd.Settings(kind="wd_tagger", model=str(demo_models["wd"])))
    there = wd.identify(wd.Settings(kind="wd_tagger", model=str(tmp_path)))
    other = wd.identify(wd.Settings(kind="wd_tagger", model=str(tmp_path), floor=0.1))

    assert here.digest == there.digest != other.digest
