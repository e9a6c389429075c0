"""The recipe `stage_c`: finetune Stable Cascade's stage C, with or without its text encoder.

Pixels → EfficientNet latents (frozen, fp32) → noised at a counted timestep → the network predicts the noise, given the
caption's CLIP states. The parts are in `training.stage_c` (latents, conditioning, objective, model, sampling, formats);
this file puts them together. Nothing here talks to other ranks.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from training.chunk_data import Batch
from training.config import Prompt, RunConfig
from training.config.latents import needs_text_model
from training.latent_sizes import decoded_size
from training.latents.store import encoder_digests
from training.precision import DTYPES
from training.recipes.base import ExportFile, Loss, SampleResult
from training.stage_c.adapter_export import export_adapters
from training.stage_c.adapters import StageCAdapters
from training.stage_c.conditioning import Conditioning
from training.stage_c.export import StageCWeights, export_stage_c
from training.stage_c.formats import load_stage_c
from training.stage_c.image import ImageConditioning
from training.stage_c.latents import LatentEncoder
from training.stage_c.model import StageCModel, require_widths
from training.stage_c.modelspec import modelspec
from training.stage_c.objective import Objective
from training.stage_c.previewer import Previewer, load_previewer
from training.stage_c.sampling import draw_latents, picture
from training.stage_c.text import load_tokenizer


class StageC:
    """See `training.recipes.base.Recipe`."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._settings = config.of_stage_c
        self._objective = Objective(self._settings)

    # --- networks ---

    def load(self, device: torch.device) -> None:
        """Load all networks; raises FileNotFoundError or WeightsError naming the file and its keys."""
        settings = self._settings
        self._device = device
        # fp16 is cast later, where values that do not fit are found; bf16 holds all of them, in half the memory.
        dtype = torch.bfloat16 if self._config.precision.weights == "bf16" else torch.float32
        lora = self._config.lora
        base_dtype = dtype if lora is None else DTYPES[lora.base_weights]
        network = load_stage_c(settings.network, dtype=base_dtype)
        network.set_dropout(settings.dropout, attention=settings.attention_dropout)
        if settings.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        has_gradients = self._config.trains_in_text_encoder
        self._conditioning = Conditioning(settings, device=device, dtype=dtype, has_gradients=has_gradients)
        self._images = ImageConditioning(settings, device=device)
        require_widths(
            network.config, settings, text=self._conditioning.widths if needs_text_model(self._config) else None,
            image=self._images.width if self._images.is_used else None,
        )  # fmt: skip
        # Without images its gradient is an exact zero: only weight decay would change it, run after run.
        network.clip_img_mapper.weight.requires_grad_(self._images.is_used)
        self._latents = LatentEncoder(settings, device=device)
        if not self._config.latents.use:
            self._latents.load()
        self._previewer: Previewer | None = None
        if settings.previewer is not None:
            self._previewer = load_previewer(Path(settings.previewer), device=device).requires_grad_(False)
        text = self._conditioning.text if has_gradients else None
        self._model = StageCModel(network.to(device), text).train()
        self._adapters: StageCAdapters | None = None
        if lora is not None or self._config.tokens is not None:
            self._adapters = StageCAdapters(self._config, self._model, self._conditioning.tokenizer)

    def trainable(self) -> nn.Module:
        return self._model

    def parts(self) -> dict[str, Iterable[nn.Parameter]]:
        if self._adapters is not None:
            return {**self._adapters.parts()}
        parts: dict[str, Iterable[nn.Parameter]] = {"network": self._model.network.parameters()}
        if self._model.text is not None:
            parts["text_encoder"] = self._model.text.parameters()
        return parts

    def learning_rates(self) -> dict[str, float]:
        optimizer = self._config.optimizer
        text_rate = optimizer.text_encoder_learning_rate or optimizer.learning_rate
        rates = {"network": optimizer.learning_rate, "text_encoder": text_rate}
        return rates if self._adapters is None else {**rates, **self._adapters.learning_rates()}

    def frozen_digests(self) -> dict[str, str]:
        ahead = self._config.latents
        latents = encoder_digests(self._config, "latents") if ahead.use else self._latents.digests()
        text = encoder_digests(self._config, "text") if ahead.text else self._conditioning.digests()
        base = {} if self._adapters is None else self._adapters.digests
        return {**latents, **text, **self._images.digests(), **base}

    # --- the loss ---

    def loss(self, model: nn.Module, batch: Batch, *, timesteps: Sequence[float] | None = None) -> Loss:
        """Return epsilon-prediction losses; timestep and noise are counted by each sample's identity.

        A sample's loss is the mean over channels and cells of mask × squared error, the mask being 1 without one: what
        a mask hides counts as no error, and does not raise the weight of what it shows (as kohya's --masked_loss).
        Validation, which gives timesteps, shows the network no picture.
        """
        latents = self._latents.of(batch)
        shown = self._images.embeddings(batch) if timesteps is None else None
        t = self._objective.timesteps(batch.identities) if timesteps is None else torch.tensor(timesteps)
        diffused = self._objective.diffuse(latents.values, t.float(), batch.identities)
        tokens = self._conditioning.tokens(batch.captions)
        states = self._conditioning.states_of(batch, tokens.windows) if self._model.text is None else None
        predicted = model(
            diffused.noised, diffused.r, windows=tokens.windows, states=states, mask=self._settings.attention_mask,
            clip_img=shown,
        )  # fmt: skip
        squares = (predicted.float() - diffused.target).square()
        if (mask := batch.mask_at(*squares.shape[2:])) is not None:
            squares = squares * mask.to(self._device)
        scalars = {"timestep": t, "logsnr": diffused.logsnr, "cut_tokens": self._conditioning.num_cut(tokens)}
        return Loss(squares.mean(dim=(1, 2, 3)), self._objective.weights(diffused.logsnr), scalars, latents.broken)

    def after_step(self, results: Sequence[SampleResult]) -> None:
        self._objective.after_step([one.scalars["logsnr"] for one in results], [one.loss for one in results])

    def state_tensors(self) -> dict[str, Tensor]:
        return self._objective.state_dict()

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self._objective.load_state_dict(tensors)

    # --- pictures and files ---

    def preview(self, prompts: Sequence[Prompt]) -> list[Image.Image]:
        if self._previewer is None:
            raise ValueError("stage_c.previewer is not set: no picture can be made")
        was_training = self._model.training
        self._model.eval()
        self._conditioning.text.eval()
        try:
            drawn = (
                draw_latents(
                    prompt, network=self._model.network, conditioning=self._conditioning, settings=self._settings
                )
                for prompt in prompts
            )
            return [picture(latents, self._previewer) for latents in drawn]
        finally:
            self._model.train(was_training)
            self._conditioning.text.train(self._conditioning.has_gradients)

    def export(
        self,
        folder: Path,
        *,
        dtype: torch.dtype,
        metadata: Mapping[str, str],
        weights: Mapping[str, Tensor] | None = None,
    ) -> list[ExportFile]:
        """Write the formats of `save.export_formats`, see `training.stage_c.export`; adapters and tokens in theirs."""
        save, adapters = self._config.save, self._adapters
        width, height = decoded_size(self._config)
        low, high = (round(1000 * timestep) for timestep in self._settings.timestep_range)
        band = {"timestep_range": f"{low},{high}"} if (low, high) != (0, 1000) else {}
        header = {
            **modelspec(title=self._config.name, width=width, height=height, extra={**band, **save.modelspec}),
            **metadata,
        }
        network_tensors, text_tensors = _of(weights, "network."), _of(weights, "text.text_model.")
        text_is_trained, tokenizer = self._model.text is not None, self._conditioning.tokenizer
        files: list[ExportFile] = []
        if adapters is not None:
            files = export_adapters(
                adapters, folder, config=self._config, tokenizer=self._conditioning.tokenizer, dtype=dtype,
                header=header, weights=self._model.state_dict() if weights is None else weights,
            )  # fmt: skip
            if not adapters.exports_networks:
                return files
            in_16_bits = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32  # fp16 is counted when written
            network_tensors = adapters.merged_network(weights, dtype=in_16_bits)
            if self._model.text is not None:
                text_tensors = adapters.merged_text(weights, dtype=in_16_bits)
            text_is_trained = adapters.changes_text
            if adapters.tokens is not None and adapters.tokens.num_new:  # a text model has no rows for them
                tokenizer = load_tokenizer(self._settings.tokenizer)
        needs_text = text_is_trained or set(save.export_formats) != {"original"}
        content = StageCWeights(
            network=self._model.network,
            text_model=self._conditioning.text.text_model if needs_text else None,
            tokenizer=tokenizer,
            text_is_trained=text_is_trained,
            network_tensors=network_tensors,
            text_tensors=text_tensors if self._model.text is not None else None,
            effnet=self._latents.effnet if "combined" in save.export_formats else None,
            previewer=self._previewer,
        )
        return files + export_stage_c(content, folder, save=save, dtype=dtype, title=self._config.name, header=header)


def _of(weights: Mapping[str, Tensor] | None, prefix: str) -> dict[str, Tensor] | None:
    if weights is None:
        return None
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
