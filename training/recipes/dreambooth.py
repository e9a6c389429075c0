"""The recipe `dreambooth`: finetune Stable Diffusion 1, 2 or XL on packed concepts, or on any other chunks.

Pixels → VAE latents (frozen) → noised at a counted timestep → the UNet predicts noise or v, given the caption's text
states and, for SDXL, the picture's size and crop. The parts are in `training.dreambooth`; this file puts them together.
Nothing here talks to other ranks. What differs between stages is in the config: `training.stages`.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from training.chunk_data import Batch
from training.config import Prompt, RunConfig
from training.dreambooth.adapters.adapters import SdAdapters
from training.dreambooth.adapters.export import export_adapters
from training.dreambooth.base_model import BaseModel
from training.dreambooth.conditioning import time_ids
from training.dreambooth.export.content import SdWeights
from training.dreambooth.export.export import export_sd
from training.dreambooth.export.header import sd_modelspec
from training.dreambooth.latents import VaeEncoder
from training.dreambooth.model import SdNetworks
from training.dreambooth.networks import conditioning_of, load_model, set_attention
from training.dreambooth.objective import Diffused, Objective, is_class
from training.dreambooth.sampling.drawing import draw_pictures
from training.dreambooth.sampling.networks import SdPictures
from training.dreambooth.sd_models.merged import merged_from
from training.latent_sizes import decoded_size
from training.latents.store import encoder_digests
from training.recipes.base import ExportFile, Loss, SampleResult
from training.stage_c.text import load_tokenizer
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
            for one in source.texts if in_text else ():
                one.gradient_checkpointing_enable()
        self._base: BaseModel | None = None
        if settings.prior_target == "base_model":
            self._base = BaseModel(self._model, self._conditioning, has_adapters=config.lora is not None)
        self._unfreeze()
        self._adapters: SdAdapters | None = None
        if config.lora is not None or config.tokens is not None:
            self._adapters = SdAdapters(config, self._model, self._conditioning.tokenizer, family=source.family)
        if (merged := merged_from(source)) is not None:
            logger.warning(
                "%s: %s; the wiki advises an original model, because a merge learns worse", settings.model, merged
            )
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
            strict_tokens=self._settings.strict_tokens,
        )
        return list(draw_pictures(prompts, networks=networks))

    def export(
        self,
        folder: Path,
        *,
        dtype: torch.dtype,
        metadata: Mapping[str, str],
        weights: Mapping[str, Tensor] | None = None,
    ) -> list[ExportFile]:
        """Write the formats of `save.export_formats`; adapters and tokens in theirs. Each is read back and compared."""
        save, adapters, source = self._config.save, self._adapters, self._source
        width, height = decoded_size(self._config)
        header = {
            **sd_modelspec(source, title=self._config.name, width=width, height=height, extra=self._entries()),
            **metadata,
        }
        live = self._model.state_dict() if weights is None else weights
        files: list[ExportFile] = []
        if adapters is not None:
            files = export_adapters(
                adapters, folder, config=self._config, tokenizer=self._conditioning.tokenizer, family=source.family,
                dtype=dtype, header=header, weights=live, predicts_v=source.prediction.kind == "v_prediction",
            )  # fmt: skip
            if not adapters.exports_networks:
                return files
        content = SdWeights(
            model=source,
            tokenizer=load_tokenizer(self._settings.tokenizer),  # without new tokens, which no text model has rows for
            unet=self._unet_weights(weights),
            texts=tuple(self._text_weights(place, weights) for place in range(len(source.texts))),
        )
        return files + export_sd(
            content, folder, formats=save.export_formats, dtype=dtype, title=self._config.name, header=header,
            card=save.model_card,
        )  # fmt: skip

    def _entries(self) -> dict[str, str]:
        """Return ModelSpec entries beyond those that are always there."""
        settings = self._settings
        low, high = (round(1000 * timestep) for timestep in settings.timestep_range)
        band = {"timestep_range": f"{low},{high}"} if (low, high) != (0, 1000) else {}
        skip = {"encoder_layer": str(settings.clip_skip)} if self._source.family != "sdxl" else {}
        return {**band, **skip, **self._config.save.modelspec}

    def _unet_weights(self, weights: Mapping[str, Tensor] | None) -> Mapping[str, Tensor] | None:
        if self._adapters is not None:
            return self._adapters.merged_unet(weights)
        if "unet" not in self._ever_trained():
            return None
        return self._model.unet.state_dict() if weights is None else _of(weights, "unet.")

    def _text_weights(self, place: int, weights: Mapping[str, Tensor] | None) -> Mapping[str, Tensor] | None:
        if self._model.text is None:
            return None
        if self._adapters is not None:
            return self._adapters.merged_text(place, weights)
        if _TEXT_PARTS[place] not in self._ever_trained():
            return None
        text = self._model.text.texts[place]
        return text.state_dict() if weights is None else _of(weights, f"text.texts.{place}.")


def _of(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
