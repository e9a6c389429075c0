"""The published networks in full size, without weights: names and shapes are those that plug-ins expect."""

import pytest

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
