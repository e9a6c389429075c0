"""README.md of an exported diffusers folder: front matter for the hub, what it is, and how to use it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sharding.files import write_bytes
from training.dreambooth.single_file.layout import Family

PIPELINES: Mapping[Family, str] = {
    "sd1": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
}
_SNIPPET = """
```python
import torch
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("this folder", torch_dtype=torch.{dtype}).to("cuda")
image = pipe(
    prompt="…",
    negative_prompt="…",
    width={width},
    height={height},
    num_inference_steps=28,
    guidance_scale=7.0,{clip_skip}
).images[0]
```
"""


def write_sd_card(
    path: Path,
    *,
    family: Family,
    title: str,
    dtype_name: str,
    header: Mapping[str, str],
    front: Mapping[str, str | Sequence[str]],
) -> None:
    """Write README.md.

    header: of the weights files, whole; its size and text layer go into the example. front: front matter, over what is
    always there.
    """
    from huggingface_hub import CardData

    values: dict[str, Any] = {"pipeline_tag": "text-to-image", "library_name": "diffusers"}
    values |= {key: one if isinstance(one, str) else list(one) for key, one in front.items()}
    facts = [f"- {key.partition('.')[2]}: {value}\n" for key, value in header.items() if key.startswith("chunkline.")]
    width, _, height = header["modelspec.resolution"].partition("x")
    layer = int(header.get("modelspec.encoder_layer", "1"))
    counted_less = f"\n    clip_skip={layer - 1},  # clip skip {layer} as A1111 counts" if layer > 1 else ""
    snippet = _SNIPPET.format(
        pipeline=PIPELINES[family],
        dtype=dtype_name,
        width=width,
        height=height,
        clip_skip="" if family == "sdxl" else counted_less,
    )
    text = f"---\n{CardData(**values).to_yaml()}\n---\n# {title}\n\n{''.join(facts)}{snippet}"
    write_bytes(path, text.encode())
