"""The recipe `dreambooth`: finetune Stable Diffusion 1, 2 or XL on packed concepts, or on any other chunks.

Pixels → VAE latents (frozen) → noised at a counted timestep → the UNet predicts noise or v, given the caption's text
states and, for SDXL, the picture's size and crop. The parts are in `training.dreambooth`; this file puts them together.
Nothing here talks to other ranks. What differs between stages is in the config: `training.stages`.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from training.chunk_data import Batch
from training.config import Prompt, RunConfig
from training.dreambooth.adapters.adapters import SdAdapters
from training.dreambooth.base_model import BaseModel
from training.dreambooth.conditioning import time_ids
from training.dreambooth.latents import VaeEncoder
from training.dreambooth.model import SdNetworks
from training.dreambooth.networks import conditioning_of, load_model, set_attention
from training.dreambooth.objective import Diffused, Objective, is_class
from training.dreambooth.sampling.drawing import draw_pictures
from training.dreambooth.sampling.networks import SdPictures
from training.latents.store import encoder_digests
from training.recipes.base import Loss, SampleResult
from training.tensor_file import digest_of_tensors

logger = logging.getLogger(__name__)

_TEXT_PARTS = ("text_encoder", "text_encoder_2")


class DreamBooth:
    """See `training.recipes.base.Recipe`."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._settings = config.of_dreambooth

    # --- networks ---

    def load(self, device: torch.device) -> None:
        """Load all networks; raises FileNotFoundError, WeightsError, or ValueError for settings that do not fit."""
        config, settings = self._config, self._settings
        self._device = device
        self._source = source = load_model(settings)
        self._require_parts(len(source.texts))
        in_text = config.trains_in_text_encoder
        self._conditioning = conditioning_of(source, settings, device=device, has_gradients=in_text)
        text = self._conditioning.text
        self._latents = VaeEncoder(settings, device=device, vae=source.vae)
        self._objective = Objective(settings, source.prediction, num_epochs=config.data.epochs)
        set_attention(source.unet, settings.attention)
        self._model = SdNetworks(source.unet.to(device), text if in_text else None).train()
        if settings.gradient_checkpointing:
            self._model.unet.enable_gradient_checkpointing()
            for one in text.texts if in_text else ():
                one.gradient_checkpointing_enable()
        self._base: BaseModel | None = None
        if settings.prior_target == "base_model":
            self._base = BaseModel(self._model, self._conditioning, has_adapters=config.lora is not None)
        self._unfreeze()
        self._adapters: SdAdapters | None = None
        if config.lora is not None or config.tokens is not None:
            self._adapters = SdAdapters(config, self._model, self._conditioning.tokenizer, family=source.family)
        logger.info(
            "%s: %s, predicts %s (%s)", settings.model, source.family, source.prediction.kind, source.prediction.said_by
        )

    def _require_parts(self, num_texts: int) -> None:
        named = {*self._settings.train, *self._settings.trained_text}
        if num_texts == 1 and "text_encoder_2" in named:
            raise ValueError(
                f"dreambooth.train names text_encoder_2, but {self._settings.model} has one text encoder: only SDXL "
                "has two; take it out"
            )

    def _unfreeze(self) -> None:
        """Let gradients reach what this stage trains: every layer of each part, but CLIP's norms where they rest."""
        train = set(self._settings.train)
        if "unet" in train:
            self._model.unet.requires_grad_(True)
        if self._model.text is None:
            return
        for part, text in zip(_TEXT_PARTS, self._model.text.texts, strict=False):
            if part in train:
                self._model.text.unfreeze(text)
                if self._settings.freeze_clip_norms:
                    for module in text.modules():
                        if isinstance(module, nn.LayerNorm):
                            module.requires_grad_(False)

    def trainable(self) -> nn.Module:
        return self._model

    def parts(self) -> dict[str, Iterable[nn.Parameter]]:
        if self._adapters is not None:
            return {**self._adapters.parts()}
        parts: dict[str, Iterable[nn.Parameter]] = {"unet": self._model.unet.parameters()}
        if self._model.text is not None:
            for part, text in zip(_TEXT_PARTS, self._model.text.texts, strict=False):
                parts[part] = text.parameters()
        return parts

    def learning_rates(self) -> dict[str, float]:
        optimizer, settings = self._config.optimizer, self._settings
        text_rate = optimizer.text_encoder_learning_rate or optimizer.learning_rate
        rates = {
            "unet": optimizer.learning_rate,
            "text_encoder": text_rate,
            "text_encoder_2": settings.text_encoder_2_learning_rate or text_rate,
        }
        return rates if self._adapters is None else {**rates, **self._adapters.learning_rates()}

    def frozen_digests(self) -> dict[str, str]:
        ahead = self._config.latents
        latents = encoder_digests(self._config, "latents") if ahead.use else self._latents.digests()
        text = encoder_digests(self._config, "text") if ahead.text else self._conditioning.digests()
        base = {} if self._adapters is None else self._adapters.digests
        if self._adapters is None and "unet" not in self._ever_trained():
            base = {"dreambooth.unet": digest_of_tensors(self._model.unet.state_dict())}
        return {**latents, **text, **base}

    def _ever_trained(self) -> set[str]:
        return {*self._settings.train, *(part for stage in self._settings.stages for part in stage.train or ())}

    # --- the loss ---

    def loss(self, model: nn.Module, batch: Batch, *, timesteps: Sequence[float] | None = None) -> Loss:
        """Return the losses of a micro-batch.

        A sample's loss is the mean over channels and cells of mask × difference, the mask being 1 without one. Class
        images are samples like others, whose weight is the prior weight; the step's loss is (1/N) Σ w L over its N
        images. With as many class images as instances that is half of diffusers' `mean + λ mean`, and kohya's.
        """
        latents = self._latents.of(batch)
        identities = batch.identities
        t = self._objective.timesteps(identities) if timesteps is None else self._objective.given_timesteps(timesteps)
        diffused = self._objective.diffuse(latents.values, t, identities)
        windows, num_cut = self._conditioning.tokens(batch.captions)
        states = self._conditioning.states_of(batch, windows) if self._model.text is None else None
        sizes = self._time_ids(batch)
        on_device = t.to(self._device)
        predicted = model(diffused.noised, on_device, windows=windows, states=states, time_ids=sizes)
        target = diffused.target if timesteps is not None else self._taught(diffused, batch, windows, sizes)
        losses = self._objective.differences(predicted.float(), target, diffused)
        if (mask := batch.mask_at(*losses.shape[2:])) is not None:
            losses = losses * mask.to(self._device)
        is_prior = torch.tensor([float(is_class(one)) for one in identities])
        scalars = {"timestep": t.float() / 1000, "cut_tokens": num_cut.float(), "is_class": is_prior}
        weights = self._objective.weights(diffused, identities).to(self._device)
        return Loss(losses.mean(dim=(1, 2, 3)), weights, scalars, latents.broken)

    def _time_ids(self, batch: Batch) -> Tensor | None:
        if self._source.family != "sdxl":
            return None
        return time_ids(batch, pixels_per_latent=self._settings.side_multiple, device=self._device)

    def _taught(self, diffused: Diffused, batch: Batch, windows: tuple[Tensor, ...], sizes: Tensor | None) -> Tensor:
        """Return the target, of class images what the base model predicts where the settings say so."""
        slots = [slot for slot, one in enumerate(batch.identities) if is_class(one)]
        if self._base is None or not slots:
            return diffused.target
        target = diffused.target.clone()
        target[slots] = self._base.predict(
            diffused.noised[slots], diffused.timesteps[slots].to(self._device), tuple(one[slots] for one in windows),
            None if sizes is None else sizes[slots],
        )  # fmt: skip
        return target

    def after_step(self, results: Sequence[SampleResult]) -> None:
        """Take note of nothing: no table depends on losses."""

    def state_tensors(self) -> dict[str, Tensor]:
        return {}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore nothing: there is no state besides the weights."""

    # --- pictures and files ---

    def preview(self, prompts: Sequence[Prompt]) -> list[Image.Image]:
        networks = SdPictures(
            family=self._source.family,
            unet=self._model.unet,
            vae=self._latents.vae,
            text=self._conditioning.text,
            tokenizer=self._conditioning.tokenizer,
            prediction=self._source.prediction,
            max_tokens=self._settings.max_tokens,
        )
        return list(draw_pictures(prompts, networks=networks))
