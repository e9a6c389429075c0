"""CLIP image embeddings against transformers: the picture's way in, the model's files, whose picture is shown."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.small_stage_c import small_batch
from tests.training.toy import toy_config
from training.memory.stage_c_architecture import CLIP_L_PARAMETERS
from training.randomness import SampleIdentity, uniform
from training.stage_c.image import ImageConditioning, clip_pixels, config_from_shapes, embed, load_image_model
from training.weight_files import WeightsError, write_tensors

transformers = pytest.importorskip("transformers")

SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 1, "image_size": 32,
    "patch_size": 8, "projection_dim": 24, "hidden_act": "quick_gelu",
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**SHAPE)).eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "image_encoder"
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (32, 32), (97, 64)])
def test_pixels_are_those_of_clips_own_image_processor(size):
    width, height = size
    smooth = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(0))
    rgb = torch.nn.functional.interpolate(smooth[None], (height, width), mode="bilinear")
    picture = Image.fromarray((rgb[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, resample=Image.Resampling.BICUBIC
    )
    theirs = torch.as_tensor(processor(picture, return_tensors="np")["pixel_values"])

    ours = clip_pixels(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255, 32)

    assert ours.shape == theirs.shape == (1, 3, 32, 32)
    assert (ours - theirs).abs().max() < 0.03  # theirs are rounded to 8 bits: 1 / 255 / 0.26


def test_embeddings_are_those_of_transformers_for_the_same_pixels(model):
    rgb = torch.rand(2, 3, 40, 48, generator=torch.Generator().manual_seed(0))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = embed(model, rgb)

    with torch.no_grad():
        theirs = model(pixel_values=clip_pixels(rgb, 32)).image_embeds
    assert torch.equal(ours, theirs) and ours.shape == (2, 24) and ours.dtype == torch.float32


def test_folders_pipelines_whole_clips_and_bare_files_load_the_same(model, folder, tmp_path):
    write_tensors(tmp_path / "bare.safetensors", dict(model.state_dict()))
    tensors = {f"conditioner.{key}": value for key, value in model.state_dict().items()}
    tensors |= {
        "conditioner.text_model.x": torch.zeros(1),
        "conditioner.vision_model.embeddings.position_ids": torch.zeros(1),
    }
    write_tensors(tmp_path / "prefixed.safetensors", tensors)
    text = transformers.CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=99
    )
    whole = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=model.config, projection_dim=24)
    )
    whole.vision_model.load_state_dict(model.vision_model.state_dict())
    whole.visual_projection.load_state_dict(model.visual_projection.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    rgb = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    for path in (
        folder,
        folder.parent,
        tmp_path / "bare.safetensors",
        tmp_path / "prefixed.safetensors",
        tmp_path / "whole",
    ):
        loaded = load_image_model(path)

        torch.testing.assert_close(embed(loaded, rgb), embed(model, rgb), msg=str(path))
        assert not loaded.training


@pytest.mark.parametrize(
    ("has", "path", "asked"),
    [
        ("image_encoder", "owner/cascade", ["image_encoder"]),
        ("", "owner/clip", ["image_encoder", ""]),
        ("mine", "owner/cascade/mine", ["mine"]),
    ],
)
def test_a_hub_id_is_a_pipelines_or_a_models_own(folder, monkeypatch, has, path, asked):
    asked_for, real = [], transformers.CLIPVisionModelWithProjection.from_pretrained

    def from_hub(source, *, subfolder=None, **options):
        asked_for.append(subfolder)
        if subfolder != has:
            raise OSError(f"{source} has no {subfolder}")
        return real(str(folder), **options)

    monkeypatch.setattr(transformers.CLIPVisionModelWithProjection, "from_pretrained", from_hub)

    assert load_image_model(path).config.projection_dim == 24
    assert asked_for == asked
    with pytest.raises(FileNotFoundError, match="owner/name has no nothing"):
        load_image_model("owner/name/nothing")


def test_the_published_model_is_known_by_its_shapes():
    published = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    published |= {"image_size": 224, "patch_size": 14, "projection_dim": 768, "hidden_act": "quick_gelu"}
    with torch.device("meta"):
        model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**published))

    assert config_from_shapes(model.state_dict(), "clip.safetensors") == published
    assert sum(parameter.numel() for parameter in model.parameters()) == CLIP_L_PARAMETERS


def test_what_is_no_image_model_is_refused(folder, model, tmp_path):
    write_tensors(tmp_path / "other.safetensors", {"x": torch.zeros(1)})
    tensors = dict(model.state_dict())
    del tensors["visual_projection.weight"]
    write_tensors(tmp_path / "half.safetensors", tensors)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps({**SHAPE, "model_type": "clip_vision_model"}))
    write_tensors(broken / "model.safetensors", tensors)

    with pytest.raises(WeightsError, match="file of another model"):
        load_image_model(tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=r"visual_projection\.weight' is missing; a CLIP image model is needed"):
        load_image_model(tmp_path / "half.safetensors")
    with pytest.raises(WeightsError, match=r"visual_projection\.weight.*would be random"):
        load_image_model(broken)
    with pytest.raises(FileNotFoundError, match="no such image_encoder"):
        load_image_model(tmp_path / "absent")


def conditioning(folder, fraction):
    settings = toy_config(stage_c={"image_encoder": str(folder), "image_embedding_fraction": fraction}).stage_c
    return ImageConditioning(settings, device=torch.device("cpu"))


def test_the_share_of_pictures_that_is_shown_is_counted_by_sample(folder, model):
    images = conditioning(folder, 0.3)
    batch = small_batch(tuple("captions"))
    shown_ones = [uniform(identity, "image embedding") < 0.3 for identity in batch.identities]

    embeddings = images.embeddings(batch)

    assert 0 < sum(shown_ones) < 8
    assert embeddings.any(dim=1).tolist() == shown_ones
    torch.testing.assert_close(embeddings[shown_ones], embed(model, batch.images[shown_ones].float() / 255))
    everyone = [SampleIdentity(seed=1, epoch=0, chunk="c", key=str(number)) for number in range(5000)]
    assert sum(uniform(one, "image embedding") < 0.1 for one in everyone) / 5000 == pytest.approx(0.1, abs=0.015)


def test_without_an_image_encoder_nothing_is_loaded_or_shown():
    images = ImageConditioning(toy_config().stage_c, device=torch.device("cpu"))

    assert not images.is_used and images.digests() == {} and images.embeddings(small_batch()) is None
