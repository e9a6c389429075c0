"""Measure what a forward and backward pass needs beside weights: the real networks, run on the meta device.

No memory is used and nothing is computed; a few seconds for the 3.6 B network. See `live_bytes` for what is counted.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from training.memory.architecture import Architecture, make_modules
from training.memory.device_rules import Device, DeviceRules
from training.memory.flops import CountFlops
from training.memory.live_bytes import LiveBytes
from training.stage_c.blocks import recomputable
from training.stage_c.model import StageCModel
from training.stage_c.text import WINDOW_TOKENS

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
    update_bytes: int = 0
    """`released`: temporaries per element of a parameter, while it is updated."""
    device: Device = "gpu"


@dataclass(frozen=True)
class PassBytes:
    """Peak beside weights and gradients that stay: a straight line over the micro-batch size, from a floor up."""

    fixed: int
    """Independent of the number of images: casts of weights, mostly."""
    per_image: int
    floor: int
    """`released`: with one image, where the update of the largest parameter may be more than activations."""
    flops_per_image: int
    """Operations of forward and backward pass, what is computed again included."""

    def extra(self, micro_batch_size: int) -> int:
        """Return the peak for so many images, without weights, without gradients that stay."""
        return max(self.floor, self.fixed + micro_batch_size * self.per_image)


def pass_bytes(architecture: Architecture, settings: Pass) -> PassBytes:
    """Measure with 4 and 8 images, and draw the line through them; with updates inside backward also with one."""
    four, eight = (measured_pass(architecture, settings, number) for number in (4, 8))
    per_image = (eight.peak - four.peak) // 4
    fixed = four.peak - 4 * per_image
    floor = measured_pass(architecture, settings, 1).peak if settings.gradients == "released" else 0
    return PassBytes(fixed, per_image, floor, (eight.flops - four.flops) // 4)


class Measured(NamedTuple):
    """peak: bytes beside weights and gradients that stay."""

    peak: int
    flops: int


def measured_pass(architecture: Architecture, settings: Pass, num_images: int) -> Measured:
    """Run the pass of so many images on the meta device."""
    rules = DeviceRules(settings.device, autocast=settings.autocast)
    with torch.device("meta"):
        model, effnet, text = make_modules(architecture)
        _prepare(model, settings, rules)
        if settings.weights == "bf16":
            _cast_parameters(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients = sum(p.numel() * p.element_size() for p in trained)
        given: list[Tensor] = [t for module in (model, effnet, text) if module for t in _tensors(module)]
        if settings.gradients == "kept":
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
                given.append(parameter.grad)
        elif settings.gradients == "released":
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(functools.partial(_update, settings.update_bytes))  # type: ignore[no-untyped-call]
        step = _step(model, effnet, text, settings, num_images, rules)
        with rules, LiveBytes(given) as live, CountFlops() as flops:
            step()
    return Measured(max(0, live.peak - (gradients if settings.gradients == "grown" else 0)), flops.total)


def _prepare(model: StageCModel, settings: Pass, rules: DeviceRules) -> None:
    network, text = model.network, model.text
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
            part.forward = rules.around(part.forward)


def _ruled(block: nn.Module, rules: DeviceRules) -> Callable[..., Tensor]:
    """Return what a block computes, and computes again, under the rules."""
    inner = rules.around(functools.partial(inspect.unwrap(type(block).forward), block))
    return lambda _, *inputs: inner(*inputs)


def _step(
    model: StageCModel,
    effnet: nn.Module | None,
    text: nn.Module | None,
    settings: Pass,
    num_images: int,
    rules: DeviceRules,
) -> Callable[[], None]:
    def step() -> None:
        """What `recipes.stage_c.StageC.loss` and the loop do, without the arithmetic of noise and weights."""
        windows = torch.empty(num_images, settings.num_windows, WINDOW_TOKENS + 2, dtype=torch.int64)
        if effnet is not None:
            with torch.no_grad(), rules.off():  # the encoder always runs in fp32
                latents = effnet(torch.empty(num_images, 3, settings.height, settings.width))
        else:
            latents = torch.empty(num_images, 16, settings.height // 32, settings.width // 32)
        noised, target, r = torch.empty_like(latents), torch.empty_like(latents), torch.empty(num_images)
        states = None
        if text is not None:
            with torch.no_grad():
                states = text(windows, False)
        elif model.text is None:
            states = _states(model, num_images, settings.num_windows)
        predicted = model(noised, r, windows=windows, states=states, mask=False)
        loss = (predicted.float() - target).square().mean(dim=(1, 2, 3)).sum()
        rules.end_forward()
        del latents, noised, target, r, states, predicted
        loss.backward()

    return step


def _states(model: StageCModel, num_images: int, num_windows: int) -> tuple[Tensor, Tensor]:
    config = model.network.config
    return (
        torch.empty(num_images, num_windows * WINDOW_TOKENS + 2, config.c_clip_text),
        torch.empty(num_images, 1, config.c_clip_text_pooled),
    )


def _cast_parameters(module: nn.Module) -> None:
    """Do what `.to(bfloat16)` does, which fake tensors refuse."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                cast = parameter.detach().to(torch.bfloat16)
                part._parameters[name] = nn.Parameter(cast, requires_grad=parameter.requires_grad)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _update(bytes_per_element: int, parameter: Tensor) -> None:
    """Take the memory of an update inside backward, and free the gradient: of 16 bits before, of 32 after."""
    if parameter.dtype != torch.float32:
        parameter.grad = None
    torch.empty(bytes_per_element * parameter.numel(), dtype=torch.uint8)
    parameter.grad = None
