"""The recipe `stage_c`: finetune Stable Cascade's stage C, with or without its text encoder.

Pixels → EfficientNet latents (frozen, fp32) → noised at a counted timestep → the network predicts the noise, given the
caption's CLIP states. Mathematics and file formats live in `training.stage_c`; nothing here talks to other ranks.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sharding.files import digest_of
from training.chunk_data import Batch
from training.config import Prompt, RunConfig
from training.randomness import SampleIdentity, normal, uniform
from training.recipes.base import ExportFile, Loss, SampleResult
from training.stage_c.effnet import EffNetEncoder, load_effnet
from training.stage_c.formats import load_stage_c, modelspec, save_stage_c
from training.stage_c.gdf import AdaptiveLossWeight, diffuse, p2_weight, sample, timestep_from_uniform
from training.stage_c.network import StageCNetwork
from training.stage_c.previewer import Previewer, load_previewer
from training.stage_c.text import TextConditioner, load_text_model, load_tokenizer, save_text_model, tokenize
from training.tensor_file import digest_of_tensors

PIXELS_PER_LATENT = 32  # of what the encoder sees


class StageCModel(nn.Module):
    """Everything that is trained, in one module with one forward."""

    def __init__(self, network: StageCNetwork, text: TextConditioner | None) -> None:
        super().__init__()
        self.network = network
        self.text = text

    def forward(
        self, noised: Tensor, r: Tensor, *, windows: Tensor, states: tuple[Tensor, Tensor] | None, mask: bool
    ) -> Tensor:
        """Return the predicted noise (B, 16, H, W).

        noised: (B, 16, H, W); r: (B,) noise level; windows: (B, W, 77) token ids, read when the text encoder is
        trained here; states: (clip_text, clip_text_pooled) of a frozen one.
        """
        if self.text is not None:
            states = self.text(windows, mask)
        assert states is not None
        predicted: Tensor = self.network(noised, r, *states)
        return predicted


class StageC:
    """See `training.recipes.base.Recipe`."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._settings = config.stage_c
        self._adaptive = AdaptiveLossWeight() if self._settings.loss_weighting == "adaptive" else None

    def load(self, device: torch.device) -> None:
        """Load all networks; raises FileNotFoundError or WeightsError naming the file and its keys."""
        settings = self._settings
        self._device = device
        self._tokenizer = load_tokenizer(settings.tokenizer)
        # fp16 is cast later, where values that do not fit are found; bf16 holds all of them, in half the memory.
        dtype = torch.bfloat16 if self._config.precision.weights == "bf16" else torch.float32
        network = load_stage_c(settings.network, dtype=dtype)
        network.set_dropout(settings.dropout)
        # No image goes in, so its gradient is an exact zero: only weight decay would change it, run after run.
        network.clip_img_mapper.weight.requires_grad_(False)
        if settings.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        text_dtype = dtype if settings.train_text_encoder else torch.float32
        text = TextConditioner(load_text_model(settings.text_encoder, text_dtype))
        text_width = text.text_model.config.hidden_size
        if text_width != network.config.c_clip_text:
            raise ValueError(
                f"stage_c.text_encoder gives states of width {text_width}, stage_c.network expects "
                f"{network.config.c_clip_text}: {settings.text_encoder} and {settings.network} do not belong together"
            )
        self._text: TextConditioner = text.to(device)
        if settings.train_text_encoder and settings.gradient_checkpointing:
            text.text_model.gradient_checkpointing_enable({"use_reentrant": False})
        self._text.train(settings.train_text_encoder).requires_grad_(settings.train_text_encoder)
        self._effnet: EffNetEncoder = load_effnet(Path(settings.effnet), device=device).requires_grad_(False)
        self._previewer: Previewer | None = None
        if settings.previewer is not None:
            self._previewer = load_previewer(Path(settings.previewer), device=device).requires_grad_(False)
        self._model = StageCModel(network.to(device), self._text if settings.train_text_encoder else None).train()

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
        frozen: dict[str, nn.Module] = {"stage_c.effnet": self._effnet}
        if self._model.text is None:
            frozen["stage_c.text_encoder"] = self._text
        vocabulary = sorted(self._tokenizer.get_vocab().items())
        return {
            **{key: digest_of_tensors(module.state_dict()) for key, module in frozen.items()},
            "stage_c.tokenizer": digest_of(vocabulary),
        }

    def loss(self, model: nn.Module, batch: Batch, *, timesteps: Sequence[float] | None = None) -> Loss:
        """Return epsilon-prediction losses; timestep and noise are counted by each sample's identity.

        A sample's loss is the mean over channels and cells of mask × squared error, the mask being 1 without one: what
        a mask hides counts as no error, and does not raise the weight of what it shows (as kohya's --masked_loss).
        """
        settings = self._settings
        rgb = batch.images.to(self._device, non_blocking=True).float() / 255
        latents = self._effnet.encode(rgb)
        if timesteps is None:
            numbers = [uniform(identity, "timestep") for identity in batch.identities]
            t = timestep_from_uniform(torch.tensor(numbers, dtype=torch.float32))
        else:
            t = torch.tensor(timesteps, dtype=torch.float32)
        shape = tuple(latents.shape[1:])
        noise = np.stack([normal(identity, "noise", shape) for identity in batch.identities])
        diffused = diffuse(latents, t.to(self._device), torch.from_numpy(noise).to(self._device))
        tokens = tokenize(self._tokenizer, batch.captions, max_tokens=settings.max_tokens)
        windows = tokens.windows.to(self._device)
        states = None
        if self._model.text is None:
            with torch.no_grad():
                states = self._text(windows, settings.attention_mask)
        predicted = model(diffused.noised, diffused.r, windows=windows, states=states, mask=settings.attention_mask)
        squares = (predicted.float() - diffused.target).square()
        if (shown := batch.mask_at(*squares.shape[2:])) is not None:
            squares = squares * shown.to(self._device)
        per_sample = squares.mean(dim=(1, 2, 3))
        weights = p2_weight(diffused.logsnr) if self._adaptive is None else self._adaptive.weight(diffused.logsnr)
        cut_tokens = (tokens.num_tokens - settings.max_tokens).clamp_min(0)
        return Loss(per_sample, weights, {"timestep": t, "logsnr": diffused.logsnr, "cut_tokens": cut_tokens})

    def after_step(self, results: Sequence[SampleResult]) -> None:
        if self._adaptive is not None and results:
            logsnr = torch.tensor([result.scalars["logsnr"] for result in results])
            self._adaptive.update(logsnr, torch.tensor([result.loss for result in results]))

    def state_tensors(self) -> dict[str, Tensor]:
        return {} if self._adaptive is None else self._adaptive.state_dict()

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        if self._adaptive is not None:
            self._adaptive.load_state_dict(tensors)

    @torch.no_grad()
    def preview(self, prompts: Sequence[Prompt]) -> list[Image.Image]:
        """Sample each prompt alone, with noise counted by its seed: a picture does not depend on its neighbours."""
        if self._previewer is None:
            raise ValueError("stage_c.previewer is not set: no picture can be made")
        was_training = self._model.training
        self._model.eval()
        self._text.eval()
        try:
            return [self._preview_one(prompt, self._previewer) for prompt in prompts]
        finally:
            self._model.train(was_training)
            self._text.train(self._settings.train_text_encoder)

    def _preview_one(self, prompt: Prompt, previewer: Previewer) -> Image.Image:
        settings = self._settings
        identity = SampleIdentity(seed=prompt.seed, epoch=0, chunk="preview", key=f"{prompt.width}x{prompt.height}")
        height, width = (latent_side(side, settings.encode_scale) for side in (prompt.height, prompt.width))
        windows = tokenize(self._tokenizer, [prompt.text, prompt.negative], max_tokens=settings.max_tokens).windows
        text, pooled = self._text(windows.to(self._device), settings.attention_mask)

        def predict(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
            both = self._model.network(x.repeat(2, 1, 1, 1), r.repeat(2), text, pooled)
            return both[:1], both[1:]

        def noise(step: int) -> Tensor:
            return torch.from_numpy(normal(identity, f"noise {step}", (1, 16, height, width))).to(self._device)

        latents = sample(
            predict, noise, num_steps=prompt.steps, shift=settings.preview_shift, cfg=prompt.guidance,
            eta=1.0 if prompt.sampler == "ddpm" else 0.0,
        )  # fmt: skip
        pixels = (previewer(latents)[0].permute(1, 2, 0) * 255).round().to(torch.uint8).cpu().numpy()
        return Image.fromarray(pixels)

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
            reports.append(save_text_model(self._text.text_model, path, dtype=dtype, state_dict=own))
        return [ExportFile(report.path, report.num_overflowed, report.num_vanished) for report in reports]


def _of(weights: Mapping[str, Tensor] | None, prefix: str) -> dict[str, Tensor] | None:
    if weights is None:
        return None
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def latent_side(pixels: int, encode_scale: float) -> int:
    """Return the latent's side for a picture's side: ceil(pixels × scale / 32); 1024 is 24 at 3/4 and 32 at 1."""
    return math.ceil(round(pixels * encode_scale / PIXELS_PER_LATENT, 6))
