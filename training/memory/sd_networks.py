"""Stable Diffusion's networks on the meta device, and a pass through them, for the memory planner."""

import copy
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from training.config.dreambooth import TEXT_PARTS
from training.dreambooth.adapters.adapters import SdAdapters
from training.dreambooth.model import SdNetworks
from training.dreambooth.networks import set_attention
from training.dreambooth.text import SdText
from training.memory.architecture import Networks, Pass, recomputed_under
from training.memory.device_rules import DeviceRules
from training.optim.selection import freeze
from training.stage_c.text import WINDOW_TOKENS, load_tokenizer

if TYPE_CHECKING:
    from training.memory.sd_architecture import SdArchitecture

_NUM_TIME_IDS = 6
"""Of SDXL: size, crop and target."""


class SdNetworksOnMeta(Networks):
    """UNet, VAE and text models as the recipe dreambooth trains them."""

    def __init__(self, architecture: "SdArchitecture") -> None:
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        config = architecture.adapters
        unet = UNet2DConditionModel(**dict(architecture.unet)).requires_grad_("unet" in architecture.train)
        set_attention(unet, "sdpa" if architecture.attention == "xformers" else architecture.attention)
        kinds = (CLIPTextModel, CLIPTextModelWithProjection)
        texts = [kinds[place](CLIPTextConfig(**dict(own))) for place, own in enumerate(architecture.texts)]
        conditioner = SdText(architecture.family, texts, clip_skip=architecture.clip_skip).requires_grad_(False)
        for text, name in zip(texts, TEXT_PARTS, strict=False):
            if name in architecture.train:
                conditioner.unfreeze(text)
                if architecture.freeze_clip_norms:
                    _freeze_norms(text)
        has_gradients = architecture.text_has_gradients
        self.model: SdNetworks = SdNetworks(unet, conditioner if has_gradients else None).train()
        base = copy.deepcopy(self.model).requires_grad_(False) if architecture.keeps_base else None
        if config is not None:
            SdAdapters(config, self.model, load_tokenizer("builtin"), family=architecture.family, is_empty=True)
            for parameter in self.model.parameters():
                if parameter.dtype == torch.float16:  # the rules' 16 bits are bf16
                    parameter.data = parameter.data.to(torch.bfloat16)
        if architecture.freeze:
            freeze(self.model, architecture.freeze)
        self.vae = AutoencoderKL(**dict(architecture.vae)).requires_grad_(False)
        self.text = None if has_gradients else conditioner
        self.frozen = tuple(module for module in (self.vae, self.text, base) if module is not None)
        self._vae_has_autocast = architecture.vae_dtype != "fp32"
        self._encodes_pixels, self._encodes_text = architecture.encodes_pixels, architecture.encodes_text
        self._stride = 2 ** (len(architecture.vae["block_out_channels"]) - 1)
        self._widths = [own["hidden_size"] for own in architecture.texts]
        self._has_size = architecture.family == "sdxl"

    def prepare(self, settings: Pass, rules: DeviceRules) -> None:
        """See `Networks`."""
        if not settings.checkpointing:
            return

        def recompute(function: Callable[..., Any], *inputs: Any) -> Any:
            return checkpoint(rules.around(function), *inputs, use_reentrant=False)

        self.model.unet.enable_gradient_checkpointing(gradient_checkpointing_func=recompute)
        texts: Iterable[Any] = () if self.model.text is None else self.model.text.texts
        for text in texts:
            has_new_name = hasattr(text, "activation_checkpointing_enable")  # the old one goes with transformers 6
            (text.activation_checkpointing_enable if has_new_name else text.gradient_checkpointing_enable)(
                {"use_reentrant": False}
            )
            # Their parts: where in a layer transformers puts its checkpoint differs between releases.
            layers = getattr(text, "text_model", text).encoder.layers
            for part in [part for layer in layers for part in layer.children()]:
                recomputed_under(rules, part)

    def encode(self, settings: Pass, num_images: int, rules: DeviceRules) -> Callable[[], None] | None:
        """See `Networks`: the VAE's encoder."""
        if not self._encodes_pixels:
            return None

        def encode() -> None:
            with torch.no_grad(), rules.switched(autocast=self._vae_has_autocast):
                self.vae.encode(torch.empty(num_images, 3, settings.height, settings.width))

        return encode

    def step(self, settings: Pass, num_images: int, rules: DeviceRules) -> Callable[[], None]:
        """See `Networks`; what the loss of `recipes.dreambooth` does with latents."""

        def step() -> None:
            latents = self._latents(settings, num_images)
            noised, target = torch.empty_like(latents), torch.empty_like(latents)
            ids = torch.empty(num_images, settings.num_windows, WINDOW_TOKENS + 2, dtype=torch.int64)
            windows = (ids,) * len(self._widths)
            states = None
            if self.text is not None and self._encodes_text:
                with torch.no_grad():
                    states = self.text(*windows)
            elif self.model.text is None:
                states = self._states(num_images, settings.num_windows)
            time_ids = torch.empty(num_images, _NUM_TIME_IDS) if self._has_size else None
            timesteps = torch.empty(num_images, dtype=torch.int64)
            predicted = self.model(noised, timesteps, windows=windows, states=states, time_ids=time_ids)
            loss = (predicted.float() - target).square().mean(dim=(1, 2, 3)).sum()
            rules.end_forward()
            del latents, noised, target, states, predicted
            loss.backward()

        return step

    def _latents(self, settings: Pass, num_images: int) -> Tensor:
        unet = self.model.unet.config
        return torch.empty(
            num_images, unet.in_channels, settings.height // self._stride, settings.width // self._stride
        )

    def _states(self, num_images: int, num_windows: int) -> tuple[Tensor, Tensor | None]:
        pooled = torch.empty(num_images, self._widths[-1]) if self._has_size else None
        return torch.empty(num_images, num_windows * WINDOW_TOKENS + 2, sum(self._widths)), pooled


def _freeze_norms(text: nn.Module) -> None:
    for part in text.modules():
        if isinstance(part, nn.LayerNorm):
            part.requires_grad_(False)
