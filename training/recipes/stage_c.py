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
from training.latents.store import encoder_digests
from training.recipes.base import ExportFile, Loss, SampleResult
from training.stage_c.conditioning import Conditioning
from training.stage_c.formats import load_stage_c, save_stage_c
from training.stage_c.image import ImageConditioning
from training.stage_c.latents import LatentEncoder
from training.stage_c.model import StageCModel
from training.stage_c.modelspec import modelspec
from training.stage_c.objective import Objective
from training.stage_c.previewer import Previewer, load_previewer
from training.stage_c.sampling import draw_latents, picture
from training.stage_c.text_files import save_text_model


class StageC:
    """See `training.recipes.base.Recipe`."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._settings = config.stage_c
        self._objective = Objective(self._settings)

    # --- networks ---

    def load(self, device: torch.device) -> None:
        """Load all networks; raises FileNotFoundError or WeightsError naming the file and its keys."""
        settings = self._settings
        self._device = device
        # fp16 is cast later, where values that do not fit are found; bf16 holds all of them, in half the memory.
        dtype = torch.bfloat16 if self._config.precision.weights == "bf16" else torch.float32
        network = load_stage_c(settings.network, dtype=dtype)
        network.set_dropout(settings.dropout, attention=settings.attention_dropout)
        if settings.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        self._conditioning = Conditioning(settings, device=device, dtype=dtype)
        if self._needs_text_model and self._conditioning.text_width != network.config.c_clip_text:
            raise ValueError(
                f"stage_c.text_encoder gives states of width {self._conditioning.text_width}, stage_c.network expects "
                f"{network.config.c_clip_text}: {settings.text_encoder} and {settings.network} do not belong together"
            )
        self._images = ImageConditioning(settings, device=device)
        if self._images.is_used and self._images.width != network.config.c_clip_img:
            raise ValueError(
                f"stage_c.image_encoder gives embeddings of width {self._images.width}, stage_c.network expects "
                f"{network.config.c_clip_img}: CLIP ViT-L/14 is the one it was trained with"
            )
        # Without images its gradient is an exact zero: only weight decay would change it, run after run.
        network.clip_img_mapper.weight.requires_grad_(self._images.is_used)
        self._latents = LatentEncoder(settings, device=device)
        if not self._config.latents.use:
            self._latents.load()
        self._previewer: Previewer | None = None
        if settings.previewer is not None:
            self._previewer = load_previewer(Path(settings.previewer), device=device).requires_grad_(False)
        text = self._conditioning.text if settings.train_text_encoder else None
        self._model = StageCModel(network.to(device), text).train()

    @property
    def _needs_text_model(self) -> bool:
        """Whether it is needed before an export: not when its states are made ahead, and no preview is drawn."""
        preview = self._config.preview
        return not self._config.latents.text or bool(preview.prompts) or preview.file is not None

    def trainable(self) -> nn.Module:
        return self._model

    def parts(self) -> dict[str, Iterable[nn.Parameter]]:
        parts: dict[str, Iterable[nn.Parameter]] = {"network": self._model.network.parameters()}
        if self._model.text is not None:
            parts["text_encoder"] = self._model.text.parameters()
        return parts

    def learning_rates(self) -> dict[str, float]:
        optimizer = self._config.optimizer
        text_rate = optimizer.text_encoder_learning_rate or optimizer.learning_rate
        return {"network": optimizer.learning_rate, "text_encoder": text_rate}

    def frozen_digests(self) -> dict[str, str]:
        ahead = self._config.latents
        latents = encoder_digests(self._config, "latents") if ahead.use else self._latents.digests()
        text = encoder_digests(self._config, "text") if ahead.text else self._conditioning.digests()
        return {**latents, **text, **self._images.digests()}

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
            self._conditioning.text.train(self._settings.train_text_encoder)

    def export(
        self,
        folder: Path,
        *,
        dtype: torch.dtype,
        metadata: Mapping[str, str],
        weights: Mapping[str, Tensor] | None = None,
    ) -> list[ExportFile]:
        """Write stage_c.safetensors in the original layout, and text_model.safetensors when it was trained."""
        width, height = self._config.buckets.resolution
        header = modelspec(title=self._config.name, width=width, height=height, extra=metadata)
        path, network = folder / "stage_c.safetensors", self._model.network
        own = _of(weights, "network.")
        reports = [save_stage_c(network, path, dtype=dtype, metadata=header, state_dict=own)]
        if self._model.text is not None:
            path = folder / "text_model.safetensors"
            own = _of(weights, "text.text_model.")
            reports.append(save_text_model(self._model.text.text_model, path, dtype=dtype, state_dict=own))
        return [ExportFile(report.path, report.num_overflowed, report.num_vanished) for report in reports]


def _of(weights: Mapping[str, Tensor] | None, prefix: str) -> dict[str, Tensor] | None:
    if weights is None:
        return None
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
