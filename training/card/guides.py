"""How to use the weights in UIs and in code. Prompts, sizes, steps and CFG are those of the run's previews."""

import json
from collections.abc import Mapping, Sequence

from training.card.settings import base_model, is_of_adapters
from training.config import Prompt, RunConfig
from training.config.concepts import FILEWORDS
from training.dreambooth.concept_prompts import concept_prompts
from training.dreambooth.export.model_card import PIPELINES
from training.dreambooth.single_file.layout import Family

PUBLISHED_DECODER = "stabilityai/stable-cascade"
HERE = "this folder"
"""Stands for a repository that has no name yet."""
_STAGE_C_EXAMPLE = """
import torch
from diffusers import StableCascadeCombinedPipeline
device = "cuda"
dtype = torch.bfloat16
model = {model}
pipe = StableCascadeCombinedPipeline.from_pretrained(model, torch_dtype=dtype)
# send everything to the gpu:
pipe = pipe.to(device, dtype=dtype)
pipe.prior_pipe = pipe.prior_pipe.to(device, dtype=dtype)
# or enable model offload to save vram:
# pipe.enable_model_cpu_offload()
prompt = {prompt}
negative_prompt = {negative}
output = pipe(
    width={width},
    height={height},
    prompt=prompt,
    negative_prompt=negative_prompt,
    decoder_guidance_scale=1.0,
    prior_guidance_scale={guidance},
    prior_num_inference_steps={steps},
    output_type="pil",
    num_inference_steps=10
).images[0]
"""
_PRIOR_EXAMPLE = """
import torch
from diffusers import StableCascadeDecoderPipeline, StableCascadePriorPipeline
device = "cuda"
dtype = torch.bfloat16
prior = StableCascadePriorPipeline.from_pretrained({model}, torch_dtype=dtype).to(device)
decoder = StableCascadeDecoderPipeline.from_pretrained("{decoder}", torch_dtype=dtype).to(device)
prompt = {prompt}
negative_prompt = {negative}
embeddings = prior(
    width={width},
    height={height},
    prompt=prompt,
    negative_prompt=negative_prompt,
    guidance_scale={guidance},
    num_inference_steps={steps}
).image_embeddings
output = decoder(
    image_embeddings=embeddings,
    prompt=prompt,
    negative_prompt=negative_prompt,
    guidance_scale=1.0,
    output_type="pil",
    num_inference_steps=10
).images[0]
"""
_SD_EXAMPLE = """
import torch
from diffusers import {pipeline}
pipe = {pipeline}.from_pretrained({model}, torch_dtype=torch.float16).to("cuda")
{adapters}prompt = {prompt}
negative_prompt = {negative}
output = pipe(
    width={width},
    height={height},
    prompt=prompt,
    negative_prompt=negative_prompt,
    guidance_scale={guidance},
    num_inference_steps={steps}{clip_skip}
).images[0]
"""


def shown_prompt(config: RunConfig) -> Prompt:
    """Return the preview that examples show: the first one, else a concept's, else an empty one of the run's size."""
    if config.preview.prompts:
        return config.preview.prompts[0]
    for one in _of_concepts(config):
        return one
    width, height = config.buckets.resolution
    if config.recipe_name == "stage_c":
        return Prompt(text="", width=1024, height=1024, steps=40, guidance=8.0)
    return Prompt(text="", width=width, height=height, steps=28, guidance=7.0, sampler="euler_a")


def _of_concepts(config: RunConfig) -> list[Prompt]:
    path = config.dreambooth.concepts if config.dreambooth is not None else None
    if path is None or not path.is_file():
        return []
    return [prompt for one in concept_prompts(config) for prompt in one.prompts if FILEWORDS not in prompt.text]


def ui_guides(config: RunConfig, *, repository: str, given: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the section `# UI Guide`. repository: of the weights; given: sections that people have written."""
    own = {"SD.Next": _sd_next(config, repository), "A1111": _a1111(config), "ComfyUI": _comfyui(config)}
    lines = ["# UI Guide"]
    for name, text in own.items():
        if shown := given.get(name, text):
            lines += [f"## {name}", *shown]
    return lines


def _sd_next(config: RunConfig, repository: str) -> list[str]:
    if is_of_adapters(config) or "diffusers" not in config.save.export_formats:
        return []
    model = config.save.hub_decoder if config.recipe_name == "stage_c" else repository
    if model is None or model == HERE:
        return []
    return [
        f"Go to Models -> Huggingface and type `{model}` into the model name and press download.  ",
        f"Load `{model}` after the download process is complete.  ",
        *_parameters(config),
    ]


def _a1111(config: RunConfig) -> list[str]:
    if config.recipe_name == "stage_c":
        return []
    if is_of_adapters(config):
        return ["Put the LoRA into `models/Lora` and write `<lora:NAME:1>` into the prompt.  ", *_parameters(config)]
    if not {"original", "ckpt"} & {*config.save.export_formats}:
        return []
    return ["Put `model.safetensors` into `models/Stable-diffusion`.  ", *_parameters(config)]


def _comfyui(config: RunConfig) -> list[str]:
    formats, lines = config.save.export_formats, list[str]()
    if is_of_adapters(config):
        lines.append('Put the LoRA into `models/loras` and load it with "Load LoRA".  ')
    elif config.recipe_name == "dreambooth":
        if "original" in formats:
            lines.append('Put `model.safetensors` into `models/checkpoints` and load it with "Load Checkpoint".  ')
    else:
        if "combined" in formats:
            lines.append('Put `combined.safetensors` into `models/checkpoints` and load it with "Load Checkpoint".  ')
        if "original" in formats:
            lines.append('Put `stage_c.safetensors` into `models/unet` and load it with "Load Diffusion Model".  ')
            if config.trains_in_text_encoder:
                lines.append("Put `text_model.safetensors` into `models/clip`, type `stable_cascade`.  ")
        if lines:
            lines.append("Stage B and stage A are the published ones.  ")
    return lines + _parameters(config) if lines else []


def _parameters(config: RunConfig) -> list[str]:
    first = shown_prompt(config)
    sizes = dict.fromkeys(f"{prompt.width}x{prompt.height}" for prompt in [*config.preview.prompts, first])
    is_stage_c = config.recipe_name == "stage_c"
    lines = ["Prompt:", "```", first.text, "```"] if first.text else []
    lines += ["Negative Prompt:", "```", first.negative, "```"] if first.negative else []
    lines += ["Parameters:  ", f"Sampler: {'Default' if is_stage_c else first.sampler}  ", f"Steps: {first.steps}  "]
    lines += ["Refiner Steps: 10  "] if is_stage_c else []
    lines += [f"CFG: {first.guidance:g}  "]
    lines += ["Secondary CFG: 1  "] if is_stage_c else _clip_skip_line(config)
    lines += [f"Resolution: {', '.join(sizes)}  "]
    return lines + (["Anything works as long as it's a multiple of 128."] if is_stage_c else [])


def _clip_skip_line(config: RunConfig) -> list[str]:
    skip = config.of_dreambooth.clip_skip
    return [f"Clip skip: {skip}  "] if skip > 1 else []


def code_example(config: RunConfig, *, repository: str, family: Family) -> list[str]:
    """Return the section `# Code Example`, for diffusers; stage C's adapters have none. family: of Stable Diffusion."""
    if is_of_adapters(config) and config.recipe_name == "stage_c":
        return []
    prompt = shown_prompt(config)
    values = {
        "prompt": _quoted(prompt.text), "negative": _quoted(prompt.negative), "width": prompt.width,
        "height": prompt.height, "steps": prompt.steps, "guidance": prompt.guidance,
    }  # fmt: skip
    if config.recipe_name == "stage_c" and config.save.hub_decoder:
        text = _STAGE_C_EXAMPLE.format(model=_quoted(config.save.hub_decoder), **values)
    elif config.recipe_name == "stage_c":  # the published decoder would bring the published prior
        text = _PRIOR_EXAMPLE.format(model=_quoted(repository), decoder=PUBLISHED_DECODER, **values)
    else:
        settings = config.of_dreambooth
        adapters = f"pipe.load_lora_weights({_quoted(repository)})\n" if is_of_adapters(config) else ""
        counted_less = f",\n    clip_skip={settings.clip_skip - 1}" if settings.clip_skip > 1 else ""
        text = _SD_EXAMPLE.format(
            pipeline=PIPELINES[family], adapters=adapters,
            model=_quoted(base_model(config) if adapters else repository),
            clip_skip="" if family == "sdxl" else counted_less, **values,
        )  # fmt: skip
    return [
        "# Code Example",
        "```shell",
        "pip install diffusers",
        "```",
        "```python",
        *text.strip().splitlines(),
        "```",
    ]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
