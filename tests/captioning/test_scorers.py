"""Scorers against transformers' own image processors and against formulas written by hand."""

import json
import shutil
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest

from captioning.annotate import annotate
from captioning.plugin import HeadModel, ModelError
from captioning.preparers import Squash
from captioning.scorers import aes_b32, aesthetic_shadow, date
from captioning.scorers.base import score_rows
from sharding.images import decode_rgb
from sharding.tables import part_metadata, part_name

SIZES = [(224, 224), (640, 480), (301, 402), (1, 1), (30, 200), (1280, 600), (1000, 3000), (225, 224)]


@pytest.mark.parametrize("size", SIZES)
def test_clip_pixels_equal_those_of_transformers(lab, demo_models, size):
    from transformers import CLIPImageProcessor

    image = decode_rgb(lab.png(*size, seed=size[1]))
    model = clip_of(aes_b32.load(settings_b32(demo_models), device="cpu"))
    theirs = CLIPImageProcessor.from_pretrained(demo_models["clip"])(image, return_tensors="np")["pixel_values"][0]

    pixels = model.preparer.prepare(image)

    assert pixels.dtype == np.uint8
    ours = model._processor.normalise(pixels[None])[0]
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


@pytest.mark.parametrize("size", SIZES)
def test_aesthetic_pixels_equal_those_of_transformers(lab, demo_models, size):
    from transformers import ViTImageProcessor

    image = decode_rgb(lab.png(*size, seed=size[0]))
    model = aesthetic_shadow.load(settings_shadow(demo_models["aesthetic"]), device="cpu")
    theirs = ViTImageProcessor.from_pretrained(demo_models["aesthetic"])(image, return_tensors="np")["pixel_values"][0]

    ours = model._processor.normalise(model.preparer.prepare(image)[None])[0]

    np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_the_aesthetic_score_is_that_of_transformers_pipeline(lab, demo_models):
    from transformers import AutoModelForImageClassification, ViTImageProcessor, pipeline

    folder = demo_models["aesthetic"]
    images = [decode_rgb(lab.png(300, 200, seed=seed)) for seed in range(4)]
    pipe = pipeline(
        "image-classification",
        model=AutoModelForImageClassification.from_pretrained(folder),
        image_processor=ViTImageProcessor.from_pretrained(folder),
        device="cpu",
    )
    model = aesthetic_shadow.load(settings_shadow(folder), device="cpu")

    rows = model.predict(np.stack([model.preparer.prepare(image) for image in images]))

    expected = [next(it["score"] for it in pipe(image) if it["label"] == "hq") for image in images]
    np.testing.assert_allclose([row["score"] for row in rows], expected, atol=1e-6)
    assert np.ptp(expected) > 0.1


def test_the_score_is_taken_by_label_and_not_by_position(lab, demo_models, tmp_path):
    swapped = tmp_path / "swapped"
    shutil.copytree(demo_models["aesthetic"], swapped)
    config = json.loads((swapped / "config.json").read_text())
    config["id2label"], config["label2id"] = {"0": "lq", "1": "hq"}, {"lq": 0, "hq": 1}
    (swapped / "config.json").write_text(json.dumps(config))
    pixels = Squash(64, 64, 2).prepare(decode_rgb(lab.png(90, 70)))[None]

    scores = [
        aesthetic_shadow.load(settings_shadow(folder), device="cpu").predict(pixels)[0]["score"]
        for folder in (demo_models["aesthetic"], swapped)
    ]

    assert scores[0] + scores[1] == pytest.approx(1, abs=1e-6)


def test_a_classifier_without_the_label_is_an_error(demo_models):
    with pytest.raises(ModelError, match="no label 'good'; it has hq, lq"):
        aesthetic_shadow.load(settings_shadow(demo_models["aesthetic"], label="good"), device="cpu")


def test_quality_is_the_head_on_clips_projected_embedding_of_each_row(lab, demo_models):
    import torch
    from transformers import CLIPImageProcessor, CLIPModel

    images = [decode_rgb(lab.png(300, 240, seed=seed)) for seed in range(4)]
    model = aes_b32.load(settings_b32(demo_models), device="cpu")
    clip = CLIPModel.from_pretrained(demo_models["clip"]).eval()
    inputs = CLIPImageProcessor.from_pretrained(demo_models["clip"])(images, return_tensors="pt")
    head = torch.nn.Sequential(
        *(torch.nn.Linear(512, 256), torch.nn.ReLU(), torch.nn.Linear(256, 128)),
        *(torch.nn.ReLU(), torch.nn.Linear(128, 1), torch.nn.Sigmoid()),
    )
    state = torch.load(demo_models["head"], weights_only=True)
    places = {"fc1": "0", "fc2": "2", "fc3": "4"}
    head.load_state_dict({name.replace(name[:3], places[name[:3]]): value for name, value in state.items()})
    with torch.no_grad():
        pooled = clip.vision_model(pixel_values=inputs["pixel_values"]).pooler_output
        embeds = clip.visual_projection(pooled)
        expected = [float(head(row / row.square().sum().sqrt())) for row in embeds]

    rows = judge(model, images)

    np.testing.assert_allclose([row["score"] for row in rows], expected, atol=1e-6)
    assert np.ptp(expected) > 0.05


@pytest.mark.parametrize("kind", ["wd", "aesthetic", "quality"])
def test_a_row_does_not_depend_on_its_neighbours(lab, demo_models, kind):
    model = load_kind(kind, demo_models)
    pictures = [decode_rgb(lab.png(100, 80, seed=seed)) for seed in range(6)]

    together = judge(model, pictures)
    other_company = judge(model, [pictures[0], *reversed(pictures[1:])])
    alone = judge(model, pictures[:1])

    assert together[0] == other_company[0]
    name = "tag_probs" if kind == "wd" else "score"
    np.testing.assert_allclose(together[0][name], alone[0][name], atol=1e-6)


def test_a_score_that_is_not_finite_is_no_result():
    rows = score_rows([0.5, float("nan"), float("inf")])

    assert [row["status"] for row in rows] == ["ok", "not_finite", "not_finite"]
    assert [row["score"] for row in rows] == [0.5, None, None]


def test_a_head_of_another_shape_is_an_error(tmp_path, demo_models):
    import torch

    torch.save({"fc1.weight": torch.zeros(8, 512)}, tmp_path / "head.pth")

    with pytest.raises(ModelError, match="expected the tensors"):
        aes_b32.load(settings_b32(demo_models, head=str(tmp_path / "head.pth")), device="cpu")


def test_the_date_score_is_the_year_and_missing_without_a_date():
    created = [datetime(2010, 12, 31, 23, 59, 59, tzinfo=UTC), None, datetime(2011, 1, 1, tzinfo=UTC)]
    records = pa.table({"created_at": pa.array(created, pa.timestamp("s", tz="UTC"))})

    rows = date.DateScorer().annotate_records(records)

    assert [(row["score"], row["status"]) for row in rows] == [(2010.0, "ok"), (None, "no_date"), (2011.0, "ok")]


def test_the_licence_of_each_model_is_shown_and_stored(lab, model_tables, caplog):
    tables = {"aesthetic": model_tables["aesthetic"] | {"licence": "CC-BY-NC-4.0"}, "wd": model_tables["wd"]}
    lab.keep(lab.save(lab.png(40, 50)))

    with caplog.at_level("INFO", logger="captioning"):
        annotate(lab.annotate_config(tables), lab.workspace)

    lines = {line.split()[1]: line for line in caplog.messages if line.startswith("loading ")}
    facts = {name: part_metadata(lab.workspace.annotations(name) / part_name(0)) for name in tables}
    assert lines["aesthetic"].endswith(f"{facts['aesthetic']['revision']}, licence CC-BY-NC-4.0")
    assert lines["wd"].endswith("its table names no licence")
    assert [facts[name]["licence"] for name in tables] == ["CC-BY-NC-4.0", ""]


def settings_shadow(folder, **values):
    return aesthetic_shadow.Settings(kind="aesthetic_shadow", model=str(folder), **values)


def settings_b32(demo_models, **values):
    files = {"clip": str(demo_models["clip"]), "head": str(demo_models["head"])}
    return aes_b32.Settings(kind="aes_b32", **(files | values))


def clip_of(head):
    return head.backbone.load(device="cpu")


def judge(model, pictures):
    """What a model says of pictures, through its backbone if it has one."""
    eye = clip_of(model) if isinstance(model, HeadModel) else model
    batch = np.stack([eye.preparer.prepare(picture) for picture in pictures])
    return model.score(eye.embed(batch)) if isinstance(model, HeadModel) else model.predict(batch)


def load_kind(kind, demo_models):
    from captioning.taggers import wd

    if kind == "wd":
        return wd.load(wd.Settings(kind="wd_tagger", model=str(demo_models["wd"])), device="cpu")
    if kind == "aesthetic":
        return aesthetic_shadow.load(settings_shadow(demo_models["aesthetic"]), device="cpu")
    return aes_b32.load(settings_b32(demo_models), device="cpu")
