"""Each switch of the recipe changes what is trained, and only that; the rest is as it was."""

from dataclasses import replace

import pytest
import torch

from tests.training.small_stage_c import losses, small_batch, small_recipe
from training.caption_text import CaptionSettings, training_caption
from training.randomness import uniform
from training.recipes.base import SampleResult

transformers = pytest.importorskip("transformers")
LONG = "a cat on a mat in the sun, " * 12  # more than 75 tokens


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=1, image_size=32, patch_size=8,
        projection_dim=32,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("clip")
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def plain(paths):
    return small_recipe(paths)


@pytest.mark.parametrize(
    "stage_c",
    [
        {"attention_mask": False},
        {"max_tokens": 150},
        {"max_tokens": 225},
        {"effnet_dtype": "bf16"},
        {"timestep_range": [0.5, 1.0]},
        {"shift": 2.0},
        {"offset_noise": 0.2},
    ],
    ids=str,
)
def test_a_switch_changes_the_loss(paths, plain, stage_c):
    batch = small_batch((LONG, "a dog"))

    changed = losses(small_recipe(paths, **stage_c), batch)

    assert changed.isfinite().all() and (changed - losses(plain, batch)).abs().max() > 1e-5


@pytest.mark.parametrize(
    "stage_c", [{"dropout": 0.5}, {"attention_dropout": "none"}, {"attention_dropout": "output"}], ids=str
)
def test_dropout_changes_the_loss_in_training_only(paths, plain, stage_c):
    changed, batch = small_recipe(paths, **stage_c), small_batch()

    assert torch.equal(losses(changed, batch), losses(plain, batch))
    assert not torch.allclose(losses(changed, batch, train=True), losses(plain, batch, train=True), rtol=1e-5)


@pytest.mark.parametrize(
    "stage_c",
    [
        {"loss_weighting": "none"},
        {"loss_weighting": "min_snr"},
        {"loss_weighting": "min_snr", "min_snr_gamma": 0.5},
        {"loss_shift": 2.0},
    ],
    ids=str,
)
def test_weights_change_what_a_sample_counts_and_not_its_loss(paths, plain, stage_c):
    batch = small_batch(tuple("captions"))
    before, after = (one.loss(one.trainable().eval(), batch) for one in (plain, small_recipe(paths, **stage_c)))

    assert torch.equal(before.per_sample, after.per_sample)
    assert not torch.allclose(before.weights, after.weights)


def test_adaptive_weights_are_state_and_follow_the_losses(paths):
    recipe, other = (small_recipe(paths, loss_weighting="adaptive") for _ in range(2))
    batch = small_batch()
    first = recipe.loss(recipe.trainable().eval(), batch)
    rows = zip(first.per_sample.tolist(), first.scalars["logsnr"].tolist(), strict=True)

    recipe.after_step([SampleResult("k", "d", "c", 4 * loss, 0.0, {"logsnr": logsnr}) for loss, logsnr in rows])
    other.load_state_tensors(recipe.state_tensors())

    assert first.weights.tolist() == [1.0, 1.0]
    after = recipe.loss(recipe.trainable(), batch).weights
    torch.testing.assert_close(after, 1 / (0.99 + 0.04 * first.per_sample.detach()), rtol=1e-5, atol=0)
    assert torch.equal(other.loss(other.trainable(), batch).weights, after)


def test_a_dropped_caption_is_the_encoded_empty_text(plain):
    recipe, batch = plain, small_batch()
    dropped = [
        training_caption(
            "a cat", [], settings=CaptionSettings(caption_dropout_fraction=1.0), identity=one, global_step=0
        )
        for one in batch.identities
    ]
    asked = []
    handle = recipe.trainable().register_forward_pre_hook(
        lambda _, args, kwargs: asked.append(kwargs["states"]), with_kwargs=True
    )

    without = losses(recipe, replace(batch, captions=dropped))
    handle.remove()

    assert dropped == ["", ""]
    empty = recipe._conditioning.encode([""])
    for states, expected in zip(asked[0], empty, strict=True):
        torch.testing.assert_close(states, expected.expand_as(states))
        assert states.any()
    assert not torch.allclose(without, losses(recipe, batch), rtol=1e-4)


def test_image_embeddings_are_shown_to_their_share_and_train_their_mapper(paths, plain, clip):
    batch = small_batch(tuple("captions"))
    shown = small_recipe(paths, image_encoder=clip, image_embedding_fraction=0.5)
    changed = losses(shown, batch) != losses(plain, batch)

    expected = [uniform(identity, "image embedding") < 0.5 for identity in batch.identities]
    assert changed.tolist() == expected and 0 < sum(expected) < 8
    for recipe, is_trained in ((plain, False), (shown, True)):
        mapper = recipe.trainable().network.clip_img_mapper
        recipe.loss(recipe.trainable(), batch).per_sample.sum().backward()
        assert mapper.weight.requires_grad == is_trained and mapper.bias.requires_grad
    assert mapper.weight.grad.any()
    assert set(shown.frozen_digests()) - set(plain.frozen_digests()) == {"stage_c.image_encoder"}
    # Validation, which says at which timesteps, shows nobody's picture.
    fixed = [0.5] * 8
    assert torch.equal(losses(shown, batch, timesteps=fixed), losses(plain, batch, timesteps=fixed))


def test_an_image_model_of_another_width_is_refused(paths, clip, tmp_path):
    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=1, image_size=32, patch_size=8,
        projection_dim=24,
    )  # fmt: skip
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(tmp_path)

    with pytest.raises(ValueError, match=r"embeddings of width 24, stage_c\.network expects 32"):
        small_recipe(paths, image_encoder=str(tmp_path), image_embedding_fraction=0.1)


def test_the_same_sample_has_the_same_noise_in_any_batch(paths):
    recipe, batch = small_recipe(paths, offset_noise=0.1), small_batch(tuple("cap"))
    one = replace(
        batch, images=batch.images[1:2], captions=batch.captions[1:2], identities=batch.identities[1:2],
        loss_weights=batch.loss_weights[1:2], is_broken=batch.is_broken[1:2],
    )  # fmt: skip

    torch.testing.assert_close(losses(recipe, one)[0], losses(recipe, batch)[1], rtol=1e-5, atol=0)


def test_a_text_encoder_of_another_width_is_refused(paths, tmp_path):
    for name, widths in {"states": (32, 48), "pooled vectors": (64, 40)}.items():
        config = transformers.CLIPTextConfig(
            hidden_size=widths[0], projection_dim=widths[1], intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=1, bos_token_id=49406, eos_token_id=49407, pad_token_id=49407, vocab_size=49408,
        )  # fmt: skip
        folder = tmp_path / name.replace(" ", "_")
        transformers.CLIPTextModelWithProjection(config).save_pretrained(folder)

        with pytest.raises(ValueError, match=rf"gives {name} of width \d+, stage_c\.network expects"):
            small_recipe({**paths, "text_encoder": folder})
