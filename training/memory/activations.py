"""Measure what a forward and backward pass needs beside weights: the real networks, run on the meta device.

No memory is used and nothing is computed; a few seconds for the 3.6 B network. See `live_bytes` for what is counted.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from training.memory.architecture import Architecture, Pass, tensors_of
from training.memory.device_rules import DeviceRules
from training.memory.flops import CountFlops
from training.memory.live_bytes import LiveBytes


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
    encode_per_image: int = 0
    """While pixels are encoded, before the rest of the pass, where that is told apart."""
    encode_fixed: int = 0
    """Below 0 by gradients that are not there yet then."""

    def extra(self, micro_batch_size: int) -> int:
        """Return the peak for so many images, without weights, without gradients that stay."""
        passing = self.fixed + micro_batch_size * self.per_image
        return max(self.floor, passing, self.encode_fixed + micro_batch_size * self.encode_per_image)


def pass_bytes(architecture: Architecture, settings: Pass) -> PassBytes:
    """Measure with 4 and 8 images, and draw the line through them; with updates inside backward also with one."""
    four, eight = (measured_pass(architecture, settings, number) for number in (4, 8))
    per_image = (eight.peak - four.peak) // 4
    fixed = four.peak - 4 * per_image
    floor = measured_pass(architecture, settings, 1).peak if settings.gradients == "released" else 0
    encoding = (eight.encode_peak - four.encode_peak) // 4
    encode_fixed = four.encode_peak - 4 * encoding
    return PassBytes(fixed, per_image, floor, (eight.flops - four.flops) // 4, encoding, encode_fixed)


class Measured(NamedTuple):
    """peak: bytes beside weights and gradients that stay."""

    peak: int
    flops: int
    encode_peak: int


def measured_pass(architecture: Architecture, settings: Pass, num_images: int) -> Measured:
    """Run the pass of so many images on the meta device."""
    rules = DeviceRules(settings.device, autocast=settings.autocast)
    with torch.device("meta"):
        networks = architecture.networks()
        networks.prepare(settings, rules)
        if settings.weights == "bf16":
            _cast_parameters(networks.model)
        trained = [p for p in networks.model.parameters() if p.requires_grad]
        gradients = sum(p.numel() * p.element_size() for p in trained)
        given = tensors_of(networks)
        if settings.gradients == "kept":
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
                given.append(parameter.grad)
        elif settings.gradients == "released":
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(functools.partial(_update, settings.update_bytes))  # type: ignore[no-untyped-call]
        encode_peak = 0
        with rules, LiveBytes(given) as live, CountFlops() as flops:
            if (encode := networks.encode(settings, num_images, rules)) is not None:
                encode()
                encode_peak, live.peak = live.peak, live.now
            networks.step(settings, num_images, rules)()
    grown = gradients if settings.gradients == "grown" else 0
    return Measured(max(0, live.peak - grown), flops.total, encode_peak and encode_peak - grown)


def _cast_parameters(module: nn.Module) -> None:
    """Do what `.to(bfloat16)` does, which fake tensors refuse."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                cast = parameter.detach().to(torch.bfloat16)
                part._parameters[name] = nn.Parameter(cast, requires_grad=parameter.requires_grad)


def _update(bytes_per_element: int, parameter: Tensor) -> None:
    """Take the memory of an update inside backward, and free the gradient: of 16 bits before, of 32 after."""
    if parameter.dtype != torch.float32:
        parameter.grad = None
    torch.empty(bytes_per_element * parameter.numel(), dtype=torch.uint8)
    parameter.grad = None
