"""Stage C's networks on the meta device, and a pass through them, for the memory planner."""

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from training.memory.architecture import Networks, Pass, recomputed_under
from training.memory.device_rules import DeviceRules
from training.stage_c.blocks import recomputable
from training.stage_c.text import WINDOW_TOKENS

if TYPE_CHECKING:
    from training.memory.stage_c_architecture import StageCArchitecture


class StageCNetworks(Networks):
    """Stage C's networks as the recipe trains them.

    Frozen parts need no gradient, `clip_img_mapper.weight` neither where no picture is shown.
    """

    def __init__(self, architecture: "StageCArchitecture") -> None:
        from transformers import CLIPTextModelWithProjection

        from training.optim.selection import freeze
        from training.stage_c.effnet import EffNetEncoder
        from training.stage_c.model import StageCModel
        from training.stage_c.network import StageCNetwork
        from training.stage_c.text import TextConditioner

        text = TextConditioner(CLIPTextModelWithProjection(architecture.text))
        config = architecture.adapters
        has_gradients = architecture.train_text_encoder or (config is not None and config.trains_in_text_encoder)
        text.train(has_gradients).requires_grad_(architecture.train_text_encoder)
        network = StageCNetwork(architecture.network)
        network.set_dropout(architecture.dropout, attention=architecture.attention_dropout)
        network.clip_img_mapper.weight.requires_grad_(architecture.image_parameters > 0)
        self.model: StageCModel = StageCModel(network, text if has_gradients else None).train()
        if config is not None:
            from training.stage_c.adapters import StageCAdapters
            from training.stage_c.text import load_tokenizer

            StageCAdapters(config, self.model, load_tokenizer("builtin"), is_empty=True)
        if architecture.freeze:
            freeze(self.model, architecture.freeze)
        self.effnet = EffNetEncoder(architecture.effnet).requires_grad_(False) if architecture.has_effnet else None
        self.text = text if architecture.has_text and not has_gradients else None
        self.frozen = tuple(module for module in (self.effnet, self.text) if module is not None)
        self.num_more_frozen = architecture.image_parameters

    def prepare(self, settings: Pass, rules: DeviceRules) -> None:
        """See `Networks`."""
        network, text = self.model.network, self.model.text
        # The meta device has no autocast that the network could ask about.
        network.residual_dtype = torch.float32 if settings.autocast or settings.weights == "fp32" else torch.bfloat16
        if not settings.checkpointing:
            return
        network.enable_gradient_checkpointing()
        for block in network.iter_blocks():
            block.forward = functools.partial(recomputable(_ruled(block, rules)), block)
        if text is not None:
            text.enable_checkpointing()
            # Their parts: where in a layer transformers puts its checkpoint differs between releases.
            for part in [part for layer in text.text_model.text_model.encoder.layers for part in layer.children()]:
                recomputed_under(rules, part)

    def step(self, settings: Pass, num_images: int, rules: DeviceRules) -> Callable[[], None]:
        """See `Networks`; what `recipes.stage_c.StageC.loss` does."""

        def step() -> None:
            windows = torch.empty(num_images, settings.num_windows, WINDOW_TOKENS + 2, dtype=torch.int64)
            if self.effnet is not None:
                with torch.no_grad(), rules.off():  # the encoder always runs in fp32
                    latents = self.effnet(torch.empty(num_images, 3, settings.height, settings.width))
            else:
                latents = torch.empty(num_images, 16, settings.height // 32, settings.width // 32)
            noised, target, r = torch.empty_like(latents), torch.empty_like(latents), torch.empty(num_images)
            states = None
            if self.text is not None:
                with torch.no_grad():
                    states = self.text(windows, False)
            elif self.model.text is None:
                states = self._states(num_images, settings.num_windows)
            predicted = self.model(noised, r, windows=windows, states=states, mask=False)
            loss = (predicted.float() - target).square().mean(dim=(1, 2, 3)).sum()
            rules.end_forward()
            del latents, noised, target, r, states, predicted
            loss.backward()

        return step

    def _states(self, num_images: int, num_windows: int) -> tuple[Tensor, Tensor]:
        config = self.model.network.config
        return (
            torch.empty(num_images, num_windows * WINDOW_TOKENS + 2, config.c_clip_text),
            torch.empty(num_images, 1, config.c_clip_text_pooled),
        )


def _ruled(block: nn.Module, rules: DeviceRules) -> Callable[..., Tensor]:
    """Return what a block computes, and computes again, under the rules."""
    inner = rules.around(functools.partial(inspect.unwrap(type(block).forward), block))
    return lambda _, *inputs: inner(*inputs)
