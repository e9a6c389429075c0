"""Measure what a forward and backward pass needs beside weights: the real networks, run on fake tensors.

No memory is used and nothing is computed; a few seconds for the 3.6 B network. See `live_bytes` for what is counted.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from training.memory.architecture import Architecture, make_modules
from training.memory.gpu_rules import GpuRules
from training.memory.live_bytes import LiveBytes
from training.stage_c.blocks import recomputable
from training.stage_c.model import StageCModel
from training.stage_c.text import WINDOW_TOKENS

if TYPE_CHECKING:
    from transformers import CLIPTextConfig

Gradients = Literal["kept", "grown", "released"]


@dataclass(frozen=True)
class Pass:
    """A forward and backward pass of one micro-batch on one rank."""

    width: int
    height: int
    """Pixels of the bucket, as the encoder sees them."""
    num_windows: int
    """Token windows of a caption: max_tokens / 75."""
    weights: Literal["fp32", "bf16"] = "fp32"
    autocast: bool = True
    """bf16 compute under fp32 weights: casts of all of them are kept until the backward pass is done with them."""
    checkpointing: bool = True
    gradients: Gradients = "kept"
    """Those of all parameters are there before (accumulation), grow in this pass, or are used up one by one."""
    attention: Literal["fused", "math"] = "fused"
    """`math` keeps attention probabilities: what torch does on a CPU when there is dropout."""


@dataclass(frozen=True)
class PassBytes:
    """Peak beside weights and gradients, as a straight line over the micro-batch size."""

    fixed: int
    """Independent of the number of images: casts of weights, mostly."""
    per_image: int
    gradients: int
    """What the gradients of all trained parameters take; with `released` the largest moment is in `fixed`."""

    def extra(self, micro_batch_size: int) -> int:
        """Return the peak for so many images, without weights, without gradients that stay."""
        return self.fixed + micro_batch_size * self.per_image


def pass_bytes(architecture: Architecture, settings: Pass) -> PassBytes:
    """Measure with 1 and 3 images and draw the line."""
    (one, gradients), (three, _) = (measured_peak(architecture, settings, num_images) for num_images in (1, 3))
    per_image = (three - one) // 2
    return PassBytes(one - per_image, per_image, gradients)


def measured_peak(architecture: Architecture, settings: Pass, num_images: int) -> tuple[int, int]:
    """Return (peak beside weights and gradients that stay, bytes of all gradients)."""
    rules = GpuRules(autocast=settings.autocast, fused_attention=settings.attention == "fused")
    with torch.device("meta"):
        model, effnet, text = make_modules(architecture)
        _prepare(model, settings, rules)
        if settings.weights == "bf16":
            for module in (model, text):
                _cast_parameters(module)
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients = sum(p.numel() * p.element_size() for p in trained)
        given: list[Tensor] = [t for module in (model, effnet, text) if module for t in _tensors(module)]
        if settings.gradients == "kept":
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
                given.append(parameter.grad)
        elif settings.gradients == "released":
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(_forget)  # type: ignore[no-untyped-call]
        step = _step(model, effnet, text, settings, num_images, rules, text_config=architecture.text)
        with rules, LiveBytes(given) as live:
            step()
    return max(0, live.peak - (gradients if settings.gradients == "grown" else 0)), gradients


def _prepare(model: StageCModel, settings: Pass, rules: GpuRules) -> None:
    network, text = model.network, model.text
    # The meta device has no autocast that the network could ask about.
    network.residual_dtype = torch.float32 if settings.autocast or settings.weights == "fp32" else torch.bfloat16
    if not settings.checkpointing:
        return
    network.enable_gradient_checkpointing()
    for block in network.iter_blocks():
        block.forward = functools.partial(recomputable(_ruled(block, rules)), block)
    if text is not None:
        text.text_model.gradient_checkpointing_enable({"use_reentrant": False})
        # Their parts: where in a layer transformers puts its checkpoint differs between releases.
        for part in [part for layer in text.text_model.text_model.encoder.layers for part in layer.children()]:
            part.forward = rules.around(part.forward)


def _ruled(block: nn.Module, rules: GpuRules) -> Callable[..., Tensor]:
    """Return what a block computes, and computes again, under the rules."""
    inner = rules.around(functools.partial(inspect.unwrap(type(block).forward), block))
    return lambda _, *inputs: inner(*inputs)


def _step(
    model: StageCModel,
    effnet: nn.Module | None,
    text: nn.Module | None,
    settings: Pass,
    num_images: int,
    rules: GpuRules,
    *,
    text_config: "CLIPTextConfig",
) -> Callable[[], None]:
    def step() -> None:
        """What `recipes.stage_c.StageC.loss` and the loop do, without the arithmetic of noise and weights."""
        rgb = torch.empty(num_images, 3, settings.height, settings.width) if effnet is not None else None
        windows = torch.empty(num_images, settings.num_windows, WINDOW_TOKENS + 2, dtype=torch.int64)
        with torch.no_grad(), rules.off():  # the encoder always runs in fp32
            latents = torch.empty(num_images, 16, settings.height // 32, settings.width // 32)
            if effnet is not None:
                latents = effnet(rgb)
        noised, target, r = torch.empty_like(latents), torch.empty_like(latents), torch.empty(num_images)
        states: tuple[Tensor, Tensor] | None = None
        if text is not None:
            with torch.no_grad():
                states = text(windows, False)
        elif model.text is None:
            length = settings.num_windows * WINDOW_TOKENS + 2
            states = (
                torch.empty(num_images, length, text_config.hidden_size),
                torch.empty(num_images, 1, text_config.projection_dim),
            )
        predicted = model(noised, r, windows=windows, states=states, mask=False)
        loss = (predicted.float() - target).square().mean(dim=(1, 2, 3)).sum()
        rules.end_forward()
        del latents, noised, target, r, states, predicted, rgb
        loss.backward()

    return step


def _cast_parameters(module: nn.Module | None) -> None:
    """Do what `.to(bfloat16)` does, which fake tensors refuse."""
    for part in [] if module is None else module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                cast = parameter.detach().to(torch.bfloat16)
                part._parameters[name] = nn.Parameter(cast, requires_grad=parameter.requires_grad)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _forget(parameter: Tensor) -> None:
    parameter.grad = None
