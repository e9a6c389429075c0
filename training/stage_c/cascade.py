"""Pictures as users of the weights make them: diffusers' pipelines with the settings of the published example.

Prior: 40 steps, guidance 8; decoder: 10 steps, guidance 1. Text is encoded with a mask over padding, in as many
windows of 75 tokens as it needs (diffusers itself cuts it after the first). Previews of a run, which follow its
training, are in `sampling`. The decoder is put together from its parts, as diffusers 0.38 and later cannot load
published folders.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from training.config import Prompt
from training.stage_c.decoder_folder import find_decoder
from training.stage_c.given_weights import GivenWeights
from training.stage_c.layouts import from_original
from training.stage_c.network import StageCNetwork
from training.stage_c.network_config import config_to_diffusers
from training.stage_c.previewer import Previewer
from training.stage_c.prior_folder import MODEL_INDEX, SCHEDULER
from training.stage_c.sampling import picture
from training.stage_c.text import MAX_TOKENS_CHOICES, TextConditioner, tokenize
from training.weight_files import WeightsError, load_into

if TYPE_CHECKING:
    from diffusers import StableCascadeDecoderPipeline, StableCascadePriorPipeline, StableCascadeUNet

PRIOR_STEPS, PRIOR_GUIDANCE = 40, 8.0
DECODER_STEPS, DECODER_GUIDANCE = 10, 1.0


def with_inference_settings(prompt: Prompt) -> Prompt:
    """Return the prompt with the published steps and guidance where it names none.

    Raises ValueError for what diffusers' pipelines cannot do.
    """
    if prompt.sampler != "ddpm" or prompt.encode_scale is not None:
        raise ValueError(
            f"prompt {prompt.text!r}: diffusers' pipelines have the sampler ddpm and one latent density only; "
            "take sampler and encode_scale out of it, or draw it from a state of the run"
        )
    settings = {"steps": PRIOR_STEPS, "guidance": PRIOR_GUIDANCE}
    return prompt.model_copy(update={key: settings[key] for key in settings.keys() - prompt.model_fields_set})


@torch.no_grad()
def draw_pictures(
    weights: GivenWeights,
    prompts: Sequence[Prompt],
    *,
    decoder: str | Path | None,
    previewer: Previewer | None,
    device: torch.device,
) -> list[Image.Image]:
    """Return one picture per prompt: of the decoder (folder or hub id) when there is one, else of the previewer.

    A picture depends on its prompt and seed alone. All latents are drawn before the decoder is loaded, in the number
    format of the weights.
    Raises ValueError when there is neither, FileNotFoundError, WeightsError.
    """
    if decoder is None and previewer is None:
        raise ValueError("neither a decoder nor a previewer: no picture can be made")
    if weights.text_model is None:
        raise ValueError("no text model in the weights or beside them: name one with --text-encoder")
    source = find_decoder(decoder) if decoder is not None else None
    prior = prior_pipeline(weights).to(device)
    encoded = [_encode(weights, prompt, device=device) for prompt in prompts]
    noise = [torch.Generator().manual_seed(prompt.seed) for prompt in prompts]  # the decoder goes on with it
    drawn = zip(prompts, encoded, noise, strict=True)
    latents = [_draw_latents(prior, prompt, *states, generator) for prompt, states, generator in drawn]
    if source is None:
        assert previewer is not None
        return [picture(one.float(), previewer.to(device)) for one in latents]
    pipeline = decoder_pipeline(source, weights).to(device)
    decoded = zip(latents, encoded, noise, strict=True)
    return [_decode(pipeline, one, states[1][:1], generator) for one, states, generator in decoded]


def unet_of(network: StageCNetwork) -> "StableCascadeUNet":
    """Return diffusers' network with all weights of ours. Raises WeightsError if a key does not fit."""
    from diffusers import StableCascadeUNet

    values = {key: value for key, value in config_to_diffusers(network.config).items() if key != "_class_name"}
    with torch.device("meta"):
        unet = StableCascadeUNet(**values)
    load_into(unet, from_original(network.state_dict(), "diffusers"), source="the given weights")
    return unet.eval()


def prior_pipeline(weights: GivenWeights) -> "StableCascadePriorPipeline":
    """Return diffusers' prior pipeline with the given weights, on the CPU, without a progress bar."""
    from diffusers import DDPMWuerstchenScheduler, StableCascadePriorPipeline

    pipeline = StableCascadePriorPipeline(
        prior=unet_of(weights.network),
        text_encoder=weights.text_model,
        tokenizer=weights.tokenizer,
        scheduler=DDPMWuerstchenScheduler(s=SCHEDULER["s"], scaler=SCHEDULER["scaler"]),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def decoder_pipeline(folder: Path, weights: GivenWeights) -> "StableCascadeDecoderPipeline":
    """Return diffusers' decoder pipeline of a folder, on the CPU. Text comes from the prior, as in the combined one.

    Raises WeightsError where diffusers cannot load a component.
    """
    from diffusers import DDPMWuerstchenScheduler, StableCascadeDecoderPipeline, StableCascadeUNet
    from diffusers.pipelines.stable_cascade.pipeline_stable_cascade import PaellaVQModel

    dtype = next(weights.network.parameters()).dtype
    index: dict[str, Any] = json.loads((folder / MODEL_INDEX).read_text("utf-8"))
    try:
        pipeline = StableCascadeDecoderPipeline(
            decoder=StableCascadeUNet.from_pretrained(folder / "decoder", torch_dtype=dtype).eval(),
            vqgan=PaellaVQModel.from_pretrained(folder / "vqgan", torch_dtype=dtype).eval(),
            scheduler=DDPMWuerstchenScheduler.from_pretrained(folder / "scheduler"),
            tokenizer=weights.tokenizer,
            text_encoder=weights.text_model,
            latent_dim_scale=index.get("latent_dim_scale", 10.67),
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{folder}: diffusers cannot load this decoder ({error})") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _encode(weights: GivenWeights, prompt: Prompt, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return states (2, 75 W + 2, C) and pooled (2, 1, P): of the text, then of the negative."""
    texts, most = [prompt.text, prompt.negative], max(MAX_TOKENS_CHOICES)
    longest = int(tokenize(weights.tokenizer, texts, max_tokens=most).num_tokens.max())
    needed = next((choice for choice in MAX_TOKENS_CHOICES if choice >= longest), most)
    windows = tokenize(weights.tokenizer, texts, max_tokens=prompt.max_tokens or needed).windows
    assert weights.text_model is not None
    states, pooled = TextConditioner(weights.text_model)(windows.to(device), prompt.attention_mask is not False)
    return states, pooled


def _draw_latents(
    pipeline: "StableCascadePriorPipeline", prompt: Prompt, states: Tensor, pooled: Tensor, generator: torch.Generator
) -> Tensor:
    output = pipeline(
        prompt_embeds=states[:1],
        prompt_embeds_pooled=pooled[:1],
        negative_prompt_embeds=states[1:] if prompt.guidance > 1 else None,
        negative_prompt_embeds_pooled=pooled[1:] if prompt.guidance > 1 else None,
        width=prompt.width,
        height=prompt.height,
        num_inference_steps=prompt.steps,
        guidance_scale=prompt.guidance,
        generator=generator,
    )
    latents: Tensor = output.image_embeddings
    return latents


def _decode(
    pipeline: "StableCascadeDecoderPipeline", latents: Tensor, pooled: Tensor, generator: torch.Generator
) -> Image.Image:
    output = pipeline(
        latents,
        prompt_embeds=pooled,  # only how many there are is looked at
        prompt_embeds_pooled=pooled,
        num_inference_steps=DECODER_STEPS,
        guidance_scale=DECODER_GUIDANCE,
        generator=generator,
    )
    image: Image.Image = output.images[0]
    return image
