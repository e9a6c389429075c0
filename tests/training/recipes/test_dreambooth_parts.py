"""What is trained of Stable Diffusion, and how: parts, norms, accumulation, formats, memory, the base as a teacher."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.training.dreambooth.toy_recipe import (
    load_recipe,
    losses_of,
    moved,
    part_of,
    save_model,
    sd_batch,
    sd_config,
    train_step,
    weighted,
    weights_of,
)
from training.dreambooth.networks import load_model

BOTH = ["unet", "text_encoder"]
HALVES = {"data": {"workspace": "none", "epochs": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), "sd1")


@pytest.fixture(scope="module")
def source(folder):
    return load_model(sd_config(folder).of_dreambooth)


@pytest.fixture
def make(folder, source):
    def make(*, chunk=None, **changes):
        config = sd_config(folder, **changes)
        return load_recipe(config, chunk=chunk, source=source), config

    return make


def gradients(recipe, batch):
    recipe.trainable().zero_grad()
    weighted(recipe, batch).backward()
    return {name: one.grad.clone() for name, one in recipe.trainable().named_parameters() if one.grad is not None}


# --- parts ---


def test_frozen_norms_stay_bit_for_bit_and_all_else_moves(make):
    recipe, config = make(train=BOTH, freeze_clip_norms=True)
    before = weights_of(recipe)

    train_step(recipe, config, sd_batch())

    norms = {
        f"text.{name}.{kind}"
        for name, module in recipe.trainable().text.named_modules()
        if isinstance(module, nn.LayerNorm)
        for kind in ("weight", "bias")
    }
    changed = moved(before, weights_of(recipe))
    assert len(norms) == 14 and not norms & changed
    # Keys have no gradient through their biases: a softmax does not see what is added to all of its inputs.
    assert {name for name in set(before) - changed - norms if "k_proj.bias" not in name} == set()
    plain, config = make(train=BOTH)
    train_step(plain, config, sd_batch())
    assert norms <= moved(before, weights_of(plain))


def test_after_the_switch_no_graph_and_no_moment_is_left_of_the_text_encoder_but_its_weights(make):
    options = {"tables": HALVES, "train": BOTH, "text_encoder_ratio": 0.5, "concepts": "c.toml"}
    first, _ = make(chunk="concepts/01-with-text", **options)
    train_step(first, first._config, sd_batch())

    second, _ = make(chunk="concepts/02-without-text", **options)
    second.trainable().load_state_dict(weights_of(first))
    before, seen = weights_of(second), []
    handle = second.trainable().text.register_forward_hook(lambda *call: seen.append(call[2][0].requires_grad))
    optimizer = train_step(second, second._config, sd_batch())
    handle.remove()

    assert seen == [False]
    assert {group["part"] for group in optimizer.param_groups} == {"unet"}
    changed = moved(before, weights_of(second))
    assert changed and all(name.startswith("unet.") for name in changed)
    assert second._text_weights(0, None) is not None  # is exported: the first stage changed it
    started, _ = make()
    assert not torch.equal(losses_of(second, sd_batch()), losses_of(started, sd_batch()))


def test_a_frozen_text_encoder_is_in_no_state_where_no_stage_trains_it(make):
    recipe, _ = make()

    assert all(name.startswith("unet.") for name in recipe.trainable().state_dict())
    assert {"dreambooth.text_encoders", "dreambooth.vae", "dreambooth.tokenizer"} == set(recipe.frozen_digests())


# --- batches ---


def test_accumulated_micro_batches_make_the_update_of_one_large_batch(make):
    whole = sd_batch(("rin", "a girl", "a dog", "a castle"), classes=(3,))
    results = []
    for micro_batches in ([[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0], [1, 2, 3]]):
        recipe, _ = make(train=BOTH)
        found = {name: torch.zeros_like(one) for name, one in recipe.trainable().named_parameters()}
        for slots in micro_batches:
            for name, gradient in gradients(recipe, part_of(whole, slots)).items():
                found[name] += gradient * len(slots) / 4
        results.append(found)

    for other in results[1:]:
        for name, gradient in results[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=1e-6)


def test_the_loss_of_a_step_is_the_mean_over_its_images_with_class_images_at_the_prior_weight(make):
    batch = sd_batch(("rin", "a girl"), classes=(1,))
    recipe, _ = make(prior_weight=0.3)

    instance, prior = losses_of(recipe, batch)

    torch.testing.assert_close(weighted(recipe, batch).detach(), (instance + 0.3 * prior) / 2)
    weights = recipe.loss(recipe.trainable(), batch).scalars["is_class"]
    assert weights.tolist() == [0.0, 1.0]


def test_a_mask_leaves_only_what_it_shows(make):
    recipe, _ = make()
    batch = sd_batch()
    masks = torch.full((2, 1, *batch.images.shape[2:]), 255, dtype=torch.uint8)
    masks[1] = 0

    found = losses_of(recipe, replace(batch, masks=masks))

    torch.testing.assert_close(found[0], losses_of(recipe, batch)[0])
    assert found[1] == 0


def test_a_sample_has_its_loss_in_any_batch(make):
    recipe, _ = make(offset_noise=0.1, multires_iterations=2, input_perturbation=0.1)
    batch = sd_batch(("rin", "a girl", "a dog"))

    torch.testing.assert_close(losses_of(recipe, part_of(batch, [2])), losses_of(recipe, batch)[2:])


# --- formats and memory ---


def test_autocast_changes_the_loss_a_little(make):
    recipe, _ = make()
    exact = losses_of(recipe, sd_batch())

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = losses_of(recipe, sd_batch())

    assert found.dtype == torch.float32 and not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.05)


def test_checkpointing_keeps_less_and_gives_the_same_gradients(make):
    def kept(recipe):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda one: sizes.append(one.numel()) or one, lambda one: one):
            weighted(recipe, sd_batch())
        return sum(sizes)

    plain, less = (make(train=BOTH, gradient_checkpointing=flag)[0] for flag in (False, True))

    expected, found = gradients(plain, sd_batch()), gradients(less, sd_batch())
    assert set(expected) == set(found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)
    assert kept(less) < 0.5 * kept(plain)


def test_attention_is_computed_otherwise_with_the_same_result(make):
    plain, sliced = make()[0], make(attention="sliced")[0]
    kinds = [
        {type(one).__name__ for one in recipe.trainable().unet.attn_processors.values()} for recipe in (plain, sliced)
    ]

    assert kinds == [{"AttnProcessor2_0"}, {"SlicedAttnProcessor"}]
    torch.testing.assert_close(losses_of(plain, sd_batch()), losses_of(sliced, sd_batch()), rtol=1e-4, atol=1e-5)


def test_weight_decay_shrinks_weights_that_a_gradient_leaves_alone(make):
    sizes = []
    for decay in (0.0, 0.5):
        recipe, config = make(tables={"optimizer": {"learning_rate": 0.1, "weight_decay": decay}})
        before = weights_of(recipe)["unet.conv_in.weight"]
        train_step(recipe, config, sd_batch())
        sizes.append(weights_of(recipe)["unet.conv_in.weight"] - before)

    expected = -0.1 * 0.5 * before
    torch.testing.assert_close(sizes[1] - sizes[0], expected, rtol=1e-3, atol=1e-5)


def test_eight_bit_adam_keeps_its_moments_in_bytes(make):
    pytest.importorskip("bitsandbytes", reason="adamw8bit is bitsandbytes' optimizer, which is not installed")
    recipe, config = make(tables={"optimizer": {"name": "adamw8bit"}})

    optimizer = train_step(recipe, config, sd_batch())

    dtypes = {one.dtype for state in optimizer.state.values() for one in state.values() if torch.is_tensor(one)}
    assert torch.uint8 in dtypes


# --- the base as a teacher ---


LORA = {"rank": 2, "base_weights": "fp32"}


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "adapters"])
@pytest.mark.parametrize("train", [["unet"], BOTH], ids=str)
def test_class_images_teach_what_the_base_predicts(make, train, lora):
    tables = {} if lora is None else {"lora": {**lora, **({"text_encoder": {"rank": 2}} if len(train) == 2 else {})}}
    recipe, config = make(tables=tables, train=train, prior_target="base_model")
    batch = sd_batch(("rin", "a girl"), classes=(1,))
    plain, _ = make()

    before = losses_of(recipe, batch)

    assert before[1] < 1e-10  # nothing is trained yet
    torch.testing.assert_close(before[0], losses_of(plain, batch)[0])
    optimizer = None
    for _ in range(3):  # a LoRA's second factor starts at 0
        optimizer = train_step(recipe, config, batch, optimizer=optimizer)
    predicted = _base_prediction(recipe, batch)
    torch.testing.assert_close(predicted, _prediction(plain, batch), rtol=1e-4, atol=1e-5)
    assert losses_of(recipe, batch)[1] > 1e-6
    is_trained = [one.requires_grad for one in recipe.trainable().parameters()]
    losses_of(recipe, batch)
    assert is_trained == [one.requires_grad for one in recipe.trainable().parameters()]


def _inputs(recipe, batch):
    latents = recipe._latents.of(batch).values
    t = recipe._objective.timesteps(batch.identities)
    noised = recipe._objective.diffuse(latents, t, batch.identities).noised
    return noised, t, recipe._conditioning.tokens(batch.captions)[0]


def _base_prediction(recipe, batch):
    return recipe._base.predict(*_inputs(recipe, batch), None)


@torch.no_grad()
def _prediction(recipe, batch):
    noised, t, windows = _inputs(recipe, batch)
    states = recipe._conditioning.states(windows)
    return recipe.trainable()(noised, t, windows=windows, states=states, time_ids=None)


def test_in_a_later_stage_the_teacher_is_still_the_model_of_the_start(make):
    stages = [{"name": "one", "epochs": 1}, {"name": "two", "epochs": 1}]
    options = {"concepts": "c.toml", "prior_target": "base_model", "stages": stages}
    batch = sd_batch(("rin", "a girl"), classes=(1,))
    first, _ = make(chunk="concepts/01-one", **options)
    train_step(first, first._config, batch)
    trained = copy.deepcopy(weights_of(first))

    second, _ = make(chunk="concepts/02-two", **options)
    second.trainable().load_state_dict(trained)

    torch.testing.assert_close(_base_prediction(second, batch), _prediction(make()[0], batch), rtol=1e-4, atol=1e-5)
    assert losses_of(second, batch)[1] > 1e-6


def test_validation_measures_noise_of_class_images_too(make):
    batch = sd_batch(("rin", "a girl"), classes=(1,))
    plain, taught = make()[0], make(prior_target="base_model")[0]

    found = losses_of(taught, batch, timesteps=[0.5, 0.5])

    assert torch.equal(found, losses_of(plain, batch, timesteps=[0.5, 0.5])) and found[1] > 0.01
