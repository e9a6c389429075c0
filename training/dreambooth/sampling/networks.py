"""The networks that draw pictures, in hand: as trained, as loaded, on any device and in any format."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from training.dreambooth.sd_models.prediction import Prediction
from training.dreambooth.single_file.layout import Family
from training.dreambooth.text import SdText

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SdPictures:
    """What draws, and how it reads prompts. Nothing here is changed by drawing."""

    family: Family
    unet: "UNet2DConditionModel"
    vae: "AutoencoderKL"
    text: SdText
    """With its clip skip."""
    tokenizer: "PreTrainedTokenizerBase"
    prediction: Prediction
    max_tokens: Literal[75, 150, 225] = 75
    """Of a prompt and of its negative, unless a Prompt says otherwise."""
    strict_tokens: bool = False
    """Never cut inside a tag."""

    @property
    def device(self) -> torch.device:
        """Where pictures are drawn."""
        device: torch.device = self.unet.device
        return device

    @property
    def pixels_per_latent(self) -> int:
        """Side of the square that one latent position stands for: 8 in Stable Diffusion."""
        num_levels = len(self.vae.config["block_out_channels"])
        return 1 << (num_levels - 1)


@contextmanager
def drawing(networks: SdPictures) -> Iterator[None]:
    """Put the networks into eval mode and off the graph; each module's own mode comes back at the end."""
    modules = list(chain.from_iterable(part.modules() for part in (networks.unet, networks.vae, networks.text)))
    modes = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


@contextmanager
def in_fp32(*parts: nn.Module) -> Iterator[None]:
    """Compute in fp32 with what may be held in half; afterwards each tensor has its format again, bit for bit."""
    halves = [
        tensor
        for part in parts
        for tensor in chain(part.parameters(), part.buffers())
        if tensor.is_floating_point() and tensor.dtype != torch.float32
    ]
    formats = [tensor.dtype for tensor in halves]
    with ExitStack() as stack:
        stack.enter_context(torch.autocast("cpu", enabled=False))
        if torch.cuda.is_available():
            stack.enter_context(torch.autocast("cuda", enabled=False))
        try:
            for tensor in halves:
                tensor.data = tensor.data.float()
            yield
        finally:
            for tensor, dtype in zip(halves, formats, strict=True):
                tensor.data = tensor.data.to(dtype)
