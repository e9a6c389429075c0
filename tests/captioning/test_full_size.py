"""The published networks in full size, without weights: names and shapes are those that plug-ins expect.

ONNX files are stand-ins with the published names of inputs and outputs, sides and numbers of labels by category.
"""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from captioning.registry import PLUGINS
from captioning.scorers import aes_b32, clip_nsfw, laion_aesthetic, waifu_scorer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def on_meta(model, config):
    with torch.device("meta"):
        return model(config).eval()


def num_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("values", "num_features", "millions"),
    [
        # openai/clip-vit-base-patch32 and clip-vit-large-patch14, config.json
        ({"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 32}, 512, 87.8),
        ({"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}, 768, 304.0),
    ],
)
def test_the_two_clips_give_embeddings_of_the_length_that_heads_take(values, num_features, millions):
    config = transformers.CLIPVisionConfig(
        **values, intermediate_size=4 * values["hidden_size"], image_size=224, projection_dim=num_features
    )
    clip = on_meta(transformers.CLIPVisionModelWithProjection, config)

    embeds = clip(pixel_values=torch.zeros(2, 3, 224, 224, device="meta")).image_embeds

    assert embeds.shape == (2, num_features)
    assert num_parameters(clip) / 1e6 == pytest.approx(millions, abs=0.4)
    if num_features == 512:
        assert aes_b32._SHAPES["fc1.weight"][1] == num_features
    else:
        heads = (laion_aesthetic, waifu_scorer, clip_nsfw)
        assert [head.NUM_FEATURES for head in heads] == [num_features] * 3


def test_aesthetic_shadow_v2_is_a_vit_of_a_billion_with_two_labels():
    """hidden 1536, 48 layers, 16 heads, MLP 4192, patch 64, picture 1024: 4.37 GB in float32."""
    config = transformers.ViTConfig(
        hidden_size=1536, num_hidden_layers=48, num_attention_heads=16, intermediate_size=4192, image_size=1024,
        patch_size=64, id2label={0: "hq", 1: "lq"}, label2id={"hq": 0, "lq": 1},
    )  # fmt: skip
    model = on_meta(transformers.ViTForImageClassification, config)

    logits = model(pixel_values=torch.zeros(1, 3, 1024, 1024, device="meta")).logits

    assert logits.shape == (1, 2) and model.vit.embeddings.position_embeddings.shape == (1, 257, 1536)
    assert num_parameters(model) * 4 / 1e9 == pytest.approx(4.37, abs=0.01)


@pytest.mark.parametrize(
    ("shapes", "megabytes"),
    [
        (laion_aesthetic._MLP, 3.71),  # size of sac+logos+ava1-l14-linearMSE.pth
        (laion_aesthetic._LINEAR, 0.003),
        (waifu_scorer._shapes(), 11.2),
        (clip_nsfw._SHAPES, 0.87),
        (aes_b32._SHAPES, 0.66),
    ],
)
def test_heads_have_the_sizes_of_their_files(shapes, megabytes):
    numbers = sum(torch.Size(shape).numel() for shape in shapes.values())

    assert numbers * 4 / 1e6 == pytest.approx(megabytes, rel=0.03)


VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
CAPTIONERS = {
    # Salesforce/blip-image-captioning-large, microsoft/git-large-textcaps and Florence-2-large, config.json
    "Blip": (
        446,
        {
            "text_config": {"hidden_size": 768, "vocab_size": 30524, "encoder_hidden_size": 1024},
            "vision_config": {**VISION, "image_size": 384, "patch_size": 16},
        },
    ),
    "Git": (394, {"vision_config": {**VISION, "image_size": 224, "patch_size": 14}, "vocab_size": 30522}),
    "Florence2": (
        777,
        {
            "text_config": {
                "model_type": "bart",
                "d_model": 1024,
                "vocab_size": 51289,
                "max_position_embeddings": 4096,
                **{f"{side}_layers": 12 for side in ("encoder", "decoder")},
            },
            "vision_config": {
                "embed_dim": [256, 512, 1024, 2048],
                "depths": [1, 1, 9, 1],
                "projection_dim": 1024,
                **{name: [8, 16, 32, 64] for name in ("num_heads", "num_groups")},
            },
        },
    ),
}


@pytest.mark.parametrize("name", CAPTIONERS)
def test_the_auto_class_makes_published_captioners_of_their_size(name):
    millions, values = CAPTIONERS[name]
    config = getattr(transformers, f"{name}Config")(**values)

    model = on_meta(transformers.AutoModelForImageTextToText.from_config, config)

    assert num_parameters(model) / 1e6 == pytest.approx(millions, abs=1)


# --- ONNX ---

RATINGS = ("general", "sensitive", "questionable", "explicit")
V3 = {"rating": 4, "general": 8106, "character": 2751}  # 10,861
V2 = {"rating": 4, "general": 6947, "character": 2132}  # 9,083
PIXAI = {"general": 9741, "character": 3720}  # 13,461
WD = ("wd_tagger", {}, "nhwc", 448)
NUMBERS = {"general": 0, "character": 4, "rating": 9}
TAGGERS = {
    "wd-swinv2-tagger-v3": (*WD, "batch_size", ("input", "output"), V3),  # and vit, convnext, vit-large, eva02-large
    "wd-v1-4-convnext-tagger-v2": (*WD, "unk__1", ("input_1:0", "predictions_sigmoid"), V2),  # and swinv2, vit, moat, …
    "pixai-tagger-v0.9-onnx": (
        *("channel_first_tagger", {"preprocessing": "pixai"}, "nchw", 448, "batch"),
        *(("input", "embedding", "logits", "prediction"), PIXAI),
    ),
}


def write_labels(path, counts):
    """Write ratings first, then general tags, then characters, as the published files have them."""
    names = [
        (RATINGS[n] if category == "rating" else f"{category}_{n}", NUMBERS[category])
        for category, number in counts.items()
        for n in range(number)
    ]
    rows = [f"{9_000_000 + place},{name},{number},5" for place, (name, number) in enumerate(names)]
    path.write_text("\n".join(["tag_id,name,category,count", *rows]) + "\n")
    return [name for name, _ in names]


@pytest.mark.parametrize("name", TAGGERS)
def test_a_tagger_of_the_published_size_names_the_right_tags(tmp_path, make_onnx, name):
    kind, values, layout, side, batch, names, counts = TAGGERS[name]
    tags = write_labels(tmp_path / "selected_tags.csv", counts)
    places = [len(tags) - counts["character"] - 1, len(tags) - counts["character"], len(tags) - 1]
    weights = np.zeros((3, len(tags)))
    weights[:, places] = [[0.1, 0.2, 0.3]]
    if layout == "nhwc":
        weights /= 255
    make_onnx(tmp_path / "model.onnx", weights, side=side, batch=batch, layout=layout, names=names)
    settings = PLUGINS[kind].Settings(kind=kind, model=str(tmp_path), **values)
    labels = PLUGINS[kind].identify(settings).labels
    model = PLUGINS[kind].load(settings, device="cpu")

    pixels = model.preparer.prepare(Image.new("RGB", (600, 400), "white"))
    (row,) = model.predict(pixels[None])

    assert pixels.shape == (side, side, 3) and model.batch_size is None
    assert Counter(labels.column("category").to_pylist()) == counts
    assert row["tag_ids"] == places and row["tag_probs"] == pytest.approx([0.3, 0.6, 0.9], rel=0.01)
    assert [labels.column("name")[place].as_py() for place in places] == [
        *(f"general_{counts['general'] - 1}", "character_0", f"character_{counts['character'] - 1}")
    ]
    assert row["rating_probs"] == ([0, 0, 0, 0] if "rating" in counts else [])


def test_deepdanbooru_of_the_published_size_has_9176_tags_of_512_pixels(tmp_path, make_onnx):
    tags = [*(f"tag_{n}" for n in range(9173)), *(f"rating:{name}" for name in ("safe", "questionable", "explicit"))]
    weights = np.zeros((3, len(tags)))
    weights[:, [7, 9173, 9175]] = [[0.1, 0.2, 0.3]]
    make_onnx(tmp_path / "model.onnx", weights, side=512, names=("inputs", "output"))
    (tmp_path / "tags.txt").write_text("\n".join(tags))
    settings = PLUGINS["deepdanbooru"].Settings(kind="deepdanbooru", model=str(tmp_path))
    model = PLUGINS["deepdanbooru"].load(settings, device="cpu")

    (row,) = model.predict(model.preparer.prepare(Image.new("RGB", (600, 400), "white"))[None])

    assert row["tag_ids"] == [7] and row["rating_probs"] == pytest.approx([0.6, 0, 0, 0.9], rel=0.01)


@pytest.mark.parametrize(
    ("kind", "side", "labels", "score"),
    [
        # deepghs/anime_aesthetic, swinv2pv3_v0_448_ls0.2_x; the network's file leaves height and width open
        ("anime_aesthetic", 448, ["worst", "low", "normal", "good", "great", "best", "masterpiece"], 5.0),
        ("style_age", 384, ["1970s-", "1980s", "1990s", "2000s", "2010s", "2015s", "2020s"], 2015.0),
    ],
)
def test_deepghs_classifiers_of_the_published_size(tmp_path, make_onnx, kind, side, labels, score):
    weights = np.zeros((3, 7))
    weights[0, 5] = 1
    make_onnx(tmp_path / "model.onnx", weights, side="side", batch="batch", layout="nchw")
    (tmp_path / "meta.json").write_text(json.dumps({"labels": labels}))
    values = {"score": "mean"} if kind == "anime_aesthetic" else {}
    settings = PLUGINS[kind].Settings(kind=kind, model=str(tmp_path), **values)
    model = PLUGINS[kind].load(settings, device="cpu")

    pixels = model.preparer.prepare(Image.new("RGB", (60, 40), "white"))

    assert pixels.shape == (side, side, 3)
    assert model.predict(pixels[None])[0]["score"] == score
