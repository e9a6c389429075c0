"""The loss of the recipe against diffusers: the same noise and timesteps through its scheduler, UNet, text models."""

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from tests.training.dreambooth.toy_recipe import FAMILIES, HEIGHT, WIDTH, load_recipe, save_model, sd_batch, sd_config
from training.dreambooth.objective import Objective
from training.dreambooth.sd_models.prediction import Prediction
from training.dreambooth.text import pad_ids
from training.randomness import normal, uniform

SCHEDULES = {
    "epsilon": {"prediction_type": "epsilon"},
    "v": {"prediction_type": "v_prediction"},
    "zero terminal SNR": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
}
CASES = [("sd1", "epsilon"), ("sd1", "zero terminal SNR"), ("sd2", "v"), ("sdxl", "epsilon"), ("sdxl", "v")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        (family, kind): save_model(root / f"{family} {kind}", family, scheduler=SCHEDULES[kind])
        for family, kind in CASES
    }


class Diffusers:
    """What diffusers and transformers make of a folder, called plainly."""

    def __init__(self, folder, family):
        self.family = family
        self.unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        self.vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
        self.texts = [CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")]
        if family == "sdxl":
            self.texts.append(CLIPTextModelWithProjection.from_pretrained(folder, subfolder="text_encoder_2"))
        self.scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")

    @torch.no_grad()
    def conditioned(self, ids):
        """Return text states (B, 77, C) and the pooled vector or None. ids: (B, 77) per text model."""
        outputs = [text(one, output_hidden_states=True) for text, one in zip(self.texts, ids, strict=True)]
        if self.family != "sdxl":
            return outputs[0].last_hidden_state, None
        return torch.cat([one.hidden_states[-2] for one in outputs], dim=-1), outputs[1].text_embeds

    @torch.no_grad()
    def latents(self, images, identities):
        latent = self.vae.encode(images.float() / 127.5 - 1).latent_dist
        noise = torch.stack([torch.from_numpy(normal(one, "latent", latent.mean.shape[1:])) for one in identities])
        return (latent.mean + latent.std * noise) * self.vae.config.scaling_factor

    @torch.no_grad()
    def differences(self, batch, ids):
        """Return (prediction - target) and timesteps of a batch, with the recipe's own random numbers."""
        z = self.latents(batch.images, batch.identities)
        t = torch.tensor([int(1000 * uniform(one, "timestep")) for one in batch.identities])
        noise = torch.stack([torch.from_numpy(normal(one, "noise", z.shape[1:])) for one in batch.identities])
        noised = self.scheduler.add_noise(z, noise, t)
        is_v = self.scheduler.config.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(z, noise, t) if is_v else noise
        states, pooled = self.conditioned(ids)
        added = None
        if pooled is not None:
            sizes = [
                [height, width, top, left, HEIGHT, WIDTH]
                for (width, height), (left, top) in zip(batch.original_sizes, batch.crops, strict=True)
            ]
            added = {"text_embeds": pooled, "time_ids": torch.tensor(sizes, dtype=torch.float32)}
        return self.unet(noised, t, states, added_cond_kwargs=added).sample - target, t


def ids_of(recipe, captions):
    """Return what transformers' own call of the tokenizer makes, padded as each text model was trained."""
    tokenizer, made = recipe._conditioning.tokenizer, []
    for pad_id in pad_ids(recipe._source.family):
        encoded = tokenizer(list(captions), padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        ids, is_token = encoded.input_ids, encoded.attention_mask.bool()
        made.append(torch.where(is_token, ids, torch.full_like(ids, pad_id)))
    return made


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_the_loss_is_what_diffusers_computes(folders, family, kind):
    recipe, diffusers = load_recipe(sd_config(folders[family, kind])), Diffusers(folders[family, kind], family)
    batch = sd_batch(("rin, a girl", "a castle by the sea", ""), keys=["a", "b", "c"])

    with torch.no_grad():
        loss = recipe.loss(recipe.trainable(), batch)

    difference, t = diffusers.differences(batch, ids_of(recipe, batch.captions))
    torch.testing.assert_close(loss.per_sample, difference.square().mean(dim=(1, 2, 3)), rtol=1e-4, atol=1e-6)
    assert loss.weights.tolist() == [1.0] * 3
    assert torch.equal(loss.scalars["timestep"], t / 1000) and len(set(t.tolist())) == 3
    if family == "sdxl":  # each sample has its own size and crop, and they matter
        alike = sd_batch(batch.captions, keys=["a", "b", "c"])
        alike.crops[1] = (50, 40)
        with torch.no_grad():
            changed = recipe.loss(recipe.trainable(), alike).per_sample != loss.per_sample
        assert changed.tolist() == [False, True, False]


def objective(kind, **options):
    prediction = Prediction("epsilon" if kind == "epsilon" else "v_prediction", kind == "zero terminal SNR", "a test")
    return Objective(sd_config("none", **options).of_dreambooth, prediction, num_epochs=1)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_snr_weights_are_those_of_diffusers_snr(kind):
    identities = sd_batch(("a",) * 8).identities
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDPMScheduler(**settings, **SCHEDULES[kind])

    for option in ({"loss_weighting": "min_snr", "loss_gamma": 2.0}, {"loss_weighting": "debiased"}):
        made = objective(kind, **option)
        t = made.timesteps(identities)
        found = made.weights(made.diffuse(torch.zeros(8, 4, 2, 2), t, identities), identities)

        snr = compute_snr(scheduler, t)
        if option["loss_weighting"] == "min_snr":
            least = torch.minimum(snr, torch.tensor(2.0))
            expected = least / snr if kind == "epsilon" else least / (snr + 1)
        else:
            expected = snr.clamp_max(1000).rsqrt() if kind == "epsilon" else 1 / (snr + 1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "option",
    [
        {"loss_weighting": "min_snr"},
        {"loss_weighting": "debiased"},
        {"loss_weighting": "p2"},
        {"loss": "huber"},
        {"loss": "smooth_l1", "huber_schedule": "exponential"},
    ],
    ids=str,
)
def test_pure_noise_has_a_finite_loss_with_every_weight_and_measure(option):
    """SNR 0 at the last timestep of a schedule with zero terminal SNR."""
    made, identities = objective("zero terminal SNR", **option), sd_batch(("a", "b")).identities

    diffused = made.diffuse(torch.ones(2, 4, 2, 2), made.given_timesteps([1.0, 0.5]), identities)

    assert diffused.snr[0] == 0 < diffused.snr[1]
    assert made.weights(diffused, identities).isfinite().all()
    assert made.differences(torch.zeros(2, 4, 2, 2), diffused.target, diffused).isfinite().all()


@pytest.mark.parametrize(
    ("end", "epochs", "expected"),
    [(None, 3, [0.75, 0.75, 0.75]), (0.25, 3, [0.75, 0.5, 0.25]), (1.0, 1, [0.75]), (0.0, 2, [0.75, 0.0])],
)
def test_class_images_have_the_prior_weight_which_may_change_over_a_stage(end, epochs, expected):
    prediction, settings = Prediction("epsilon", False, "a test"), sd_config("none", prior_weight_end=end).of_dreambooth
    made = Objective(settings, prediction, num_epochs=epochs)

    for epoch, weight in enumerate(expected):
        identities = sd_batch(("a", "b"), classes=(1,), epoch=epoch).identities
        diffused = made.diffuse(torch.zeros(2, 4, 2, 2), torch.tensor([5, 5]), identities)
        assert made.weights(diffused, identities).tolist() == pytest.approx([1.0, weight])


def test_huber_measures_the_same_difference(folders):
    folder = folders["sd1", "epsilon"]
    recipe = load_recipe(sd_config(folder, loss="huber", huber_schedule="constant", huber_c=0.2))
    batch = sd_batch()

    with torch.no_grad():
        found = recipe.loss(recipe.trainable(), batch).per_sample

    difference, _ = Diffusers(folder, "sd1").differences(batch, ids_of(recipe, batch.captions))
    expected = 2 * 0.2 * ((difference.square() + 0.04).sqrt() - 0.2)
    torch.testing.assert_close(found, expected.mean(dim=(1, 2, 3)), rtol=1e-4, atol=1e-6)


def test_clip_skip_is_counted_as_a1111_counts_it(folders):
    folder, batch = folders["sd1", "epsilon"], sd_batch()
    recipe, diffusers = load_recipe(sd_config(folder, clip_skip=2)), Diffusers(folder, "sd1")
    text = diffusers.texts[0]
    inner = getattr(text, "text_model", text)

    def conditioned(ids):
        read = text(ids[0], output_hidden_states=True).hidden_states[-2]  # A1111: -clip_skip, then the last norm
        return inner.final_layer_norm(read), None

    diffusers.conditioned = torch.no_grad()(conditioned)
    with torch.no_grad():
        found = recipe.loss(recipe.trainable(), batch).per_sample

    difference, _ = diffusers.differences(batch, ids_of(recipe, batch.captions))
    torch.testing.assert_close(found, difference.square().mean(dim=(1, 2, 3)), rtol=1e-4, atol=1e-6)


def test_families_are_all_compared():
    assert {family for family, _ in CASES} == set(FAMILIES)
