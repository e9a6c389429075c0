"""Taggers beside WD on tiny files in the real formats, and WD's older ones; golden pixels made by other libraries."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from captioning.annotate import annotate
from captioning.onnx_session import open_session
from captioning.plugin import ModelError
from captioning.stages import read_stages
from captioning.taggers import channel_first, deepdanbooru, wd
from captioning.taggers.base import Label
from captioning.taggers.labels import read_tag_mapping
from sharding.tables import read_part

TAGS = [("general", 9), ("sensitive", 9), ("questionable", 9), ("explicit", 9), ("1girl", 0), ("hatsune_miku", 4)]


def write_tags(folder, tags=TAGS, *, columns=("tag_id", "name", "category", "count")):
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "selected_tags.csv").open("w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(
            {name: {"name": tag, "category": category}.get(name, 7) for name in columns} for tag, category in tags
        )


def shown_to(model):
    """Record what the network sees."""
    shown, run = [], model._session.run
    model._session.run = lambda batch: (shown.append(batch), run(batch))[1]
    return shown


def tag(model, image):
    return model.predict(model.preparer.prepare(image)[None])[0]


# --- WD, old and new files ---


@pytest.mark.parametrize(
    ("names", "batch"),
    [
        (("input_1:0", "predictions_sigmoid"), "unk__2222"),  # v1.4, by tf2onnx
        (("input", "output"), "batch_size"),  # v3, by timm
        (("input_1", "predictions"), None),  # not named either
        (("input_1:0", "predictions_sigmoid"), 2),  # fixed
    ],
)
def test_every_generation_of_wd_files_is_read_as_it_is(lab, tmp_path, make_onnx, names, batch):
    weights = np.full((3, 6), 0.001)
    weights[:, 5] = 0.0005
    make_onnx(tmp_path / "wd" / "model.onnx", weights, names=names, batch=batch)
    write_tags(tmp_path / "wd")
    lab.keep(lab.save(*(lab.plain(grey) for grey in (255, 100, 20))))

    annotate(lab.annotate_config({"wd": {"kind": "wd_tagger", "model": str(tmp_path / "wd")}}), lab.workspace)

    # Padded to 64 x 64 with white: 48 of 64 rows are the grey.
    means = [(48 * grey + 16 * 255) / 64 for grey in (255, 100, 20)]
    rows = list(lab.rows("wd").values())
    for row, mean in zip(rows, means, strict=True):
        np.testing.assert_allclose(row["rating_probs"], [3 * mean * 0.001] * 4, rtol=0.01)
        assert row["tag_ids"] == [4, 5]
        np.testing.assert_allclose(row["tag_probs"], [3 * mean * 0.001, 3 * mean * 0.0005], rtol=0.01)


def test_a_wd_file_that_is_no_image_model_is_named(tmp_path, make_onnx):
    make_onnx(tmp_path / "model.onnx", np.zeros((3, 6)), layout="nchw")
    write_tags(tmp_path)

    with pytest.raises(ModelError, match=r"expected one input N x side x side x 3, found \['batch_size', 3, 16, 16\]"):
        wd.load(wd.Settings(kind="wd_tagger", model=str(tmp_path)), device="cpu")


# --- channel first ---


def channel_first_model(folder, make_onnx, weights, **options):
    make_onnx(folder / "model.onnx", weights, layout="nchw", **options)
    return folder


def load(folder, **values):
    settings = channel_first.Settings(kind="channel_first_tagger", model=str(folder), **values)
    return channel_first.load(settings, device="cpu")


@pytest.mark.parametrize("size", [(64, 48), (1, 1), (30, 900), (16, 16)])
def test_pixai_sees_a_squashed_picture_and_has_no_ratings(tmp_path, make_onnx, picture, size):
    weights = np.array([[0.5, 0.0], [0.0, 0.5], [0.0, 0.0]])
    names = ("input", "embedding", "logits", "prediction")
    channel_first_model(tmp_path, make_onnx, weights, side=16, names=names, is_sigmoid=True)
    write_tags(tmp_path, [("1girl", 0), ("hatsune_miku", 4)], columns=("id", "tag_id", "name", "category", "ips"))
    model = load(tmp_path, preprocessing="pixai")
    shown = shown_to(model)

    row = tag(model, picture(*size))

    squashed = np.asarray(picture(*size).resize((16, 16), Image.BILINEAR), dtype=np.float64).transpose(2, 0, 1)
    np.testing.assert_allclose(shown[0][0], squashed / 127.5 - 1, atol=1e-6)
    means = (squashed / 127.5 - 1).mean(axis=(1, 2))
    np.testing.assert_allclose(row["tag_probs"], 1 / (1 + np.exp(-0.5 * means[:2])), atol=1e-5)
    assert row["rating_probs"] == [] and row["tag_ids"] == [0, 1]


def test_a_tag_mapping_model_sees_bgr_in_a_white_square_and_gives_logits(tmp_path, make_onnx, picture):
    mapping = {
        "0": {"tag": "general", "category": "Rating"}, "1": {"tag": "sensitive", "category": "Rating"},
        "2": {"tag": "questionable", "category": "Rating"}, "3": {"tag": "explicit", "category": "Rating"},
        "4": {"tag": "best quality", "category": "Quality"}, "6": {"tag": "miku", "category": "Character"},
    }  # fmt: skip
    weights = np.zeros((3, 7))
    weights[:, 4], weights[:, 5], weights[:, 6] = [1, 0, 0], [5, 5, 5], [0, 0, 1]
    channel_first_model(tmp_path / "sub", make_onnx, weights, side=16)
    (tmp_path / "sub" / "tag_mapping.json").write_text(json.dumps(mapping))
    options = {"labels": "tag_mapping.json", "preprocessing": "tag_mapping", "subfolder": "sub"}
    model = load(tmp_path, activation="sigmoid", **options)
    shown = shown_to(model)

    row = tag(model, picture(30, 20))

    square = Image.new("RGB", (30, 30), "white")
    square.paste(picture(30, 20), (0, 5))
    bgr = np.asarray(square.resize((16, 16), Image.BICUBIC), dtype=np.float64)[..., ::-1].transpose(2, 0, 1)
    np.testing.assert_allclose(shown[0][0], bgr / 127.5 - 1, atol=1e-6)
    blue, _, red = (bgr / 127.5 - 1).mean(axis=(1, 2))
    assert row["rating_probs"] == [0.5] * 4 and row["tag_ids"] == [4, 6]  # 5 is not in the file
    np.testing.assert_allclose(row["tag_probs"], 1 / (1 + np.exp([-blue, -red])), atol=1e-5)


def test_stages_for_another_side_than_the_models_are_an_error(tmp_path, make_onnx):
    channel_first_model(tmp_path, make_onnx, np.zeros((3, 2)), side=32)
    write_tags(tmp_path, [("1girl", 0), ("solo", 0)])
    (tmp_path / "preprocess.json").write_text(json.dumps(STAGES))

    with pytest.raises(ModelError, match=r"preprocess\.json gives 16 pixels, model\.onnx takes 32"):
        load(tmp_path, preprocessing="preprocess.json")


def test_logits_that_are_taken_for_probabilities_are_an_error(tmp_path, make_onnx):
    channel_first_model(tmp_path, make_onnx, np.full((3, 2), -2.0), side=16)
    write_tags(tmp_path, [("1girl", 0), ("solo", 0)])

    with pytest.raises(ModelError, match="gives logits; choose another output or activation"):
        tag(load(tmp_path, preprocessing="pixai"), Image.new("RGB", (9, 9), "white"))


def test_probabilities_that_are_taken_for_logits_are_an_error(tmp_path, make_onnx):
    channel_first_model(tmp_path, make_onnx, np.full((3, 2), -2.0), side=16, is_sigmoid=True)
    write_tags(tmp_path, [("1girl", 0), ("solo", 0)])

    with pytest.raises(ModelError, match="gives probabilities already; set activation = none"):
        tag(load(tmp_path, preprocessing="pixai", activation="sigmoid"), Image.new("RGB", (9, 9), "white"))


@pytest.mark.parametrize("colour", ["#0a141e", "rgb(10, 20, 30)", [10, 20, 30]])
def test_a_stage_pads_with_its_own_colour(tmp_path, colour):
    stage = {"type": "pad_to_size", "size": [8, 8], "background_color": colour}
    (tmp_path / "preprocess.json").write_text(json.dumps({"stages": [stage]}))

    pixels = read_stages(tmp_path / "preprocess.json").prepare(Image.new("RGB", (8, 2), "white"))

    assert (pixels[:3] == (10, 20, 30)).all() and (pixels[3:5] == 255).all()


STAGES = {
    "test": [
        {"type": "pad_to_size", "size": [32, 32], "background_color": "white", "interpolation": "bilinear"},
        {"type": "resize", "size": 20, "interpolation": "bicubic", "max_size": None, "antialias": True},
        {"type": "center_crop", "size": [16, 16]},
        {"type": "maybe_to_tensor"},
        {"type": "normalize", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    ]
}


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (1, 1), (7, 300), (32, 32)])
def test_the_stages_of_preprocess_json_are_done_one_after_the_other(tmp_path, make_onnx, picture, size):
    """By the rules of imgutils' pad_image_to_size and torchvision's Resize, CenterCrop, Normalize, written out."""
    channel_first_model(tmp_path, make_onnx, np.full((3, 2), 0.01), side="side", is_sigmoid=True)
    write_tags(tmp_path, [("1girl", 0), ("solo", 0)])
    (tmp_path / "preprocess.json").write_text(json.dumps(STAGES))
    model = load(tmp_path, preprocessing="preprocess.json")
    shown = shown_to(model)

    tag(model, picture(*size))

    ratio = min(32 / size[0], 32 / size[1])
    inner = (max(round(size[0] * ratio), 1), max(round(size[1] * ratio), 1))
    canvas = Image.new("RGB", (32, 32), "white")
    canvas.paste(picture(*size).resize(inner, Image.BILINEAR), ((32 - inner[0]) // 2, (32 - inner[1]) // 2))
    pixels = np.asarray(canvas.resize((20, 20), Image.BICUBIC).crop((2, 2, 18, 18)), dtype=np.float64) / 255
    expected = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(shown[0][0], expected.transpose(2, 0, 1), atol=1e-5)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"type": "rotate", "size": 3}], "unknown type 'rotate'"),
        ([{"type": "resize"}], "is not understood"),
        ([{"type": "resize", "size": 8, "interpolation": "magic"}], "is not understood"),
        ([{"type": "resize", "size": 8, "max_size": 16}], "max_size 16 is not supported"),
        ([{"type": "pad_to_size", "size": 8, "background_color": "odd"}], "is not understood"),
        ([{"type": "to_tensor"}], "expected a stage with a size"),
        ({"a": 1}, "expected a list of stages"),
    ],
)
def test_stages_that_are_not_understood_are_an_error(tmp_path, stages, message):
    (tmp_path / "preprocess.json").write_text(json.dumps({"stages": stages}))

    with pytest.raises(ModelError, match=message):
        read_stages(tmp_path / "preprocess.json")


def test_a_tag_mapping_may_be_two_tables(tmp_path):
    values = {"idx_to_tag": {"1": "miku", "0": "solo"}, "tag_to_category": {"miku": "Character", "solo": "General"}}
    (tmp_path / "tag_mapping.json").write_text(json.dumps(values))

    assert read_tag_mapping(tmp_path / "tag_mapping.json") == [Label("solo", "general"), Label("miku", "character")]


@pytest.mark.parametrize("text", ["[1]", "{}", '{"0": {"tag": "a"}}', '{"0": {"tag": "a", "category": "Odd"}}', "{"])
def test_a_broken_tag_mapping_is_an_error_that_names_it(tmp_path, text):
    (tmp_path / "tag_mapping.json").write_text(text)

    with pytest.raises(ModelError, match=r"tag_mapping\.json: "):
        read_tag_mapping(tmp_path / "tag_mapping.json")


def test_several_outputs_without_a_known_name_are_an_error(tmp_path, make_onnx):
    path = make_onnx(tmp_path / "model.onnx", np.zeros((3, 2)), names=("input", "a", "b"))

    with pytest.raises(ModelError, match="several outputs; it has a, b"):
        open_session(path, "cpu")
    with pytest.raises(ModelError, match="no output 'c'; it has a, b"):
        open_session(path, "cpu", output="c")
    assert open_session(path, "cpu", output="b").num_values == 2


@pytest.mark.parametrize("device", ["cuda", "rocm", "migraphx", "openvino"])
def test_every_device_by_name_is_an_error_where_it_is_missing(tmp_path, make_onnx, device):
    import onnxruntime

    from captioning.onnx_session import PROVIDERS

    path = make_onnx(tmp_path / "model.onnx", np.zeros((3, 2)))
    if PROVIDERS[device][0] in onnxruntime.get_available_providers():
        pytest.skip(f"this machine has {device}")

    with pytest.raises(ModelError, match=f"annotate.device '{device}' needs onnxruntime's {PROVIDERS[device][0]}"):
        open_session(path, device)


# --- DeepDanbooru ---

# By OpenCV 5.0 (INTER_AREA on float32) and scikit-image 0.26, as deepdanbooru.image does it:
#   t = AffineTransform(translation=(-w / 2, -h / 2)) + AffineTransform(translation=(8, 8))
#   warp(shrunk, t.inverse, output_shape=(16, 16), order=1, mode="edge"); the pixels (8, 7), (0, 0) and (3, 15)
DEEPDANBOORU = {
    (97, 61): [(174.97, 131.84, 143.19), (51.0, 17.12, 22.29), (175.49, 92.33, 220.23)],
    (61, 97): [(84.06, 118.9, 137.27), (50.87, 17.21, 22.23), (159.48, 129.21, 127.28)],
    (64, 48): [(42.0, 116.0, 111.0), (30.0, 8.0, 11.0), (166.0, 88.0, 83.0)],
    (16, 11): [(120.5, 65.5, 65.5), (0.0, 0.0, 0.0), (111.5, 226.5, 75.5)],
    (16, 16): [(153.0, 73.0, 99.0), (0.0, 0.0, 0.0), (144.0, 234.0, 84.0)],
}


@pytest.mark.parametrize("size", DEEPDANBOORU)
def test_deepdanboorus_pixels_are_those_of_its_own_program(picture, size):
    pixels = deepdanbooru.FitPreparer(16, is_original=True).prepare(picture(*size))

    found = [pixels[place].tolist() for place in ((8, 7), (0, 0), (3, 15))]
    np.testing.assert_allclose(found, DEEPDANBOORU[size], atol=0.52)


@pytest.mark.parametrize("is_original", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (1, 900), (5000, 2), (512, 511)])
def test_every_size_fits_deepdanboorus_square(picture, is_original, size):
    pixels = deepdanbooru.FitPreparer(64, is_original=is_original).prepare(picture(*size))

    assert pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8


def test_imgutils_deepdanbooru_stands_on_black(picture):
    pixels = deepdanbooru.FitPreparer(16, is_original=False).prepare(picture(97, 61))  # 61 * 16 / 97 = 10.06

    assert (pixels[:3] == 0).all() and (pixels[13:] == 0).all()
    np.testing.assert_array_equal(pixels[3:13], np.asarray(picture(97, 61).resize((16, 10), Image.BICUBIC)))


def test_deepdanbooru_has_three_ratings_and_characters_of_its_second_file(lab, tmp_path, make_onnx):
    folder = tmp_path / "dd"
    weights = np.tile([[0.1, 0.2, 0.3, 0.2, 0.01]], (3, 1))
    make_onnx(folder / "model.onnx", weights, names=("inputs", "output"))
    (folder / "tags.txt").write_text("1girl\nhatsune_miku\nrating:safe\nrating:questionable\nrating:explicit\n")
    (folder / "tags-character.txt").write_text("hatsune_miku\n")
    lab.keep(lab.save(lab.plain(255)))

    annotate(lab.annotate_config({"dd": {"kind": "deepdanbooru", "model": str(folder)}}), lab.workspace)

    (row,) = lab.rows("dd").values()
    np.testing.assert_allclose(row["rating_probs"], [0.9, 0, 0.6, 0.03], atol=1e-5)  # general sensitive questionable …
    assert row["tag_ids"] == [0, 1]
    np.testing.assert_allclose(row["tag_probs"], [0.3, 0.6], atol=1e-5)
    labels = read_part(lab.workspace.annotations("dd") / "labels.parquet").to_pylist()
    assert [(it["name"], it["category"]) for it in labels][:3] == [
        *(("1girl", "general"), ("hatsune_miku", "character"), ("general", "rating"))
    ]


def test_an_unknown_rating_of_deepdanbooru_is_an_error(tmp_path):
    (tmp_path / "tags.txt").write_text("rating:weird\n")

    with pytest.raises(ModelError, match="unknown rating 'rating:weird'"):
        deepdanbooru.read_labels(tmp_path)
