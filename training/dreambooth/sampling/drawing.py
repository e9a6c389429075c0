"""Draw pictures: prompt → latents → pixels, with a Stable Diffusion model in hand.

Equal to diffusers' StableDiffusionPipeline and StableDiffusionXLPipeline with the same scheduler, seed and states,
which the tests show. A picture's noise comes from a CPU generator of its own seed, so neither its neighbours nor the
device choose it. Nothing is written to files here.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from training.config import Prompt
from training.dreambooth.sampling.networks import SdPictures, drawing, in_fp32
from training.dreambooth.sampling.samplers import GUIDANCE_RESCALE, make_scheduler
from training.dreambooth.strict_tokens import tokenize_whole_tags
from training.dreambooth.text import pad_ids, tokenize

_SHARED = ("width", "height", "steps", "guidance", "sampler", "max_tokens")
"""What prompts that are drawn at once have in common."""
_MOMENTS = ("latents_mean", "latents_std")


class NotFiniteError(ValueError):
    """A picture came out as not a number, also in fp32: the model's weights are broken."""


def draw_pictures(prompts: Sequence[Prompt], *, networks: SdPictures, batch_size: int = 1) -> Iterator[Image.Image]:
    """Yield a picture of each prompt, in order.

    batch_size: how many neighbours of the same size and settings are drawn at once. On the CPU each is drawn alone:
    there, the number of pictures drawn at once changes their last bits. Raises ValueError when a prompt cannot be
    drawn, NotFiniteError when the model gives no numbers.
    """
    size = batch_size if networks.device.type != "cpu" else 1
    for batch in batches(prompts, size=size):
        latents = draw_latents(batch, networks=networks)
        for number in range(len(batch)):
            yield decode(latents[number : number + 1], networks=networks)


def batches(prompts: Sequence[Prompt], *, size: int) -> Iterator[list[Prompt]]:
    """Yield the prompts in order, at most `size` neighbours together that can be drawn at once."""
    batch: list[Prompt] = []
    for prompt in prompts:
        if batch and (len(batch) == size or _settings(prompt) != _settings(batch[0])):
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch


def draw_latents(prompts: Sequence[Prompt], *, networks: SdPictures) -> Tensor:
    """Return the latents (B, 4, height / 8, width / 8), float32, of prompts with one size and one set of settings.

    Drawn in the networks' own format, under the caller's autocast; what comes out not finite is drawn again in fp32.
    """
    settings = _settings(prompts[0])
    if other := next((prompt for prompt in prompts if _settings(prompt) != settings), None):
        raise ValueError(f"prompts of one batch differ: {_settings(other)} and {settings}")
    with drawing(networks):
        latents = _sample(prompts, networks)
        for number in _not_finite(latents):
            with in_fp32(networks.unet, networks.text):
                latents[number] = _sample([prompts[number]], networks)[0]
    if broken := _not_finite(latents):
        text = prompts[broken[0]].text
        raise NotFiniteError(f"{text!r}: the model draws no numbers, in fp32, too: its weights are broken")
    return latents


def _not_finite(latents: Tensor) -> list[int]:
    return [number for number, one in enumerate(latents) if not one.isfinite().all()]


def decode(latents: Tensor, *, networks: SdPictures) -> Image.Image:
    """Return the picture of latents (1, 4, h, w); the VAE always runs in fp32, as SDXL's overflows in fp16."""
    config = networks.vae.config
    unscaled = latents.float() / config["scaling_factor"]
    if all(config.get(name) is not None for name in _MOMENTS):
        mean, std = (torch.tensor(config[name], device=latents.device).view(1, -1, 1, 1) for name in _MOMENTS)
        unscaled = unscaled * std + mean
    with drawing(networks), in_fp32(networks.vae):
        pixels: Tensor = networks.vae.decode(unscaled.to(networks.vae.device), return_dict=False)[0]
    if not pixels.isfinite().all():
        raise NotFiniteError("the VAE gives no numbers, in fp32, too; give another one as dreambooth.vae")
    values = (pixels[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).cpu() * 255
    return Image.fromarray(values.round().to(torch.uint8).numpy())


def _settings(prompt: Prompt) -> tuple[Any, ...]:
    return tuple(getattr(prompt, name) for name in _SHARED)


def _sample(prompts: Sequence[Prompt], networks: SdPictures) -> Tensor:
    first = prompts[0]
    scheduler = make_scheduler(first.sampler, steps=first.steps, prediction=networks.prediction)
    is_guided = first.guidance > 1
    conditions = _conditions(prompts, networks, is_guided=is_guided)
    generators = [torch.Generator().manual_seed(prompt.seed) for prompt in prompts]
    latents = _noise(first, networks, generators) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, t)
        predicted = _predict(torch.cat([scaled] * 2) if is_guided else scaled, t, conditions, networks)
        if is_guided:
            rescale = GUIDANCE_RESCALE if networks.prediction.zero_terminal_snr else 0.0
            predicted = guided(*predicted.chunk(2), guidance=first.guidance, rescale=rescale)
        latents = scheduler.step(predicted, t, latents, generator=generators, return_dict=False)[0]
    assert isinstance(latents, Tensor)
    return latents


def guided(without: Tensor, with_text: Tensor, *, guidance: float, rescale: float) -> Tensor:
    """Return a prediction led away from the negative prompt, (B, C, h, w).

    rescale: how far its spread is brought back to that of the prompt's own (Lin et al. 2024, equations 15 and 16).
    """
    led = without + guidance * (with_text - without)
    if rescale == 0:
        return led
    own, new = (each.std(dim=(1, 2, 3), keepdim=True) for each in (with_text, led))
    return rescale * led * (own / new) + (1 - rescale) * led


def _noise(prompt: Prompt, networks: SdPictures, generators: Sequence[torch.Generator]) -> Tensor:
    step = networks.pixels_per_latent
    if wrong := [side for side in (prompt.width, prompt.height) if side % step]:
        raise ValueError(f"a picture of {prompt.width}x{prompt.height}: {wrong[0]} is not a multiple of {step}")
    shape = (1, networks.unet.config["in_channels"], prompt.height // step, prompt.width // step)
    return torch.cat([torch.randn(shape, generator=each) for each in generators]).to(networks.device)


def _predict(scaled: Tensor, t: Tensor, conditions: tuple[Tensor, Any], networks: SdPictures) -> Tensor:
    states, added = conditions
    predicted: Tensor = networks.unet(
        scaled.to(states.dtype), t.to(scaled.device), states, added_cond_kwargs=added, return_dict=False
    )[0]
    return predicted.float()


def _conditions(
    prompts: Sequence[Prompt], networks: SdPictures, *, is_guided: bool
) -> tuple[Tensor, dict[str, Tensor] | None]:
    """Return states and SDXL's pooled vectors and sizes: of the negatives, when guided, then of the prompts."""
    texts = [prompt.negative for prompt in prompts] if is_guided else []
    texts += [prompt.text for prompt in prompts]
    first = prompts[0]
    states, pooled = _encode(texts, networks, max_tokens=first.max_tokens or networks.max_tokens)
    dtype = networks.unet.dtype
    states = states.to(networks.device, dtype)
    if networks.family != "sdxl":
        return states, None
    assert pooled is not None
    pooled = pooled.to(networks.device, dtype)
    # SDXL was trained with zeros for "no text", and diffusers and A1111 guide away from these; SD 1 and 2 from "".
    empty = [number for number, text in enumerate(texts[: -len(prompts)]) if not text]
    states[empty], pooled[empty] = 0, 0
    sizes = [first.height, first.width, 0, 0, first.height, first.width]
    time_ids = torch.tensor([sizes] * len(texts), device=networks.device, dtype=torch.float32)  # bf16 ends at 256
    return states, {"text_embeds": pooled, "time_ids": time_ids}


def _encode(texts: Sequence[str], networks: SdPictures, *, max_tokens: int) -> tuple[Tensor, Tensor | None]:
    device = next(networks.text.parameters()).device
    make = tokenize_whole_tags if networks.strict_tokens else tokenize
    windows = [
        make(networks.tokenizer, texts, max_tokens=max_tokens, pad_id=pad_id).windows.to(device)
        for pad_id in pad_ids(networks.family)
    ]
    encoded: tuple[Tensor, Tensor | None] = networks.text(*windows)
    return encoded
