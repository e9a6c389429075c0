"""README.md of an exported diffusers folder: front matter that diffusers reads, and how to use what lies beside it.

`prior:` in the decoder's folder is what StableCascadeCombinedPipeline follows to find the prior; `decoder:` in the
prior's folder is for people and other programs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sharding.files import write_bytes

_SNIPPET = """
```python
import torch
from diffusers import StableCascadeCombinedPipeline

pipe = StableCascadeCombinedPipeline.from_pretrained("{decoder}", torch_dtype=torch.bfloat16)
pipe = pipe.to("cuda", dtype=torch.bfloat16)
pipe.prior_pipe = pipe.prior_pipe.to("cuda", dtype=torch.bfloat16)
image = pipe(
    prompt="…",
    negative_prompt="…",
    width=1024,
    height=1024,
    prior_num_inference_steps=40,
    prior_guidance_scale=8.0,
    num_inference_steps=10,
    decoder_guidance_scale=1.0,
).images[0]
```
"""


def read_front_matter(path: Path) -> dict[str, Any]:
    """Return a README's front matter; empty when there is no README, or none in it."""
    from huggingface_hub import metadata_load

    return dict(metadata_load(path) or {}) if path.is_file() else {}


def write_model_card(
    path: Path, *, title: str, front: Mapping[str, str | Sequence[str]], facts: Sequence[str], decoder: str
) -> None:
    """Write README.md. front: front matter; facts: lines that say what this is; decoder: to load the whole cascade."""
    from huggingface_hub import CardData

    values: dict[str, Any] = {key: one if isinstance(one, str) else list(one) for key, one in front.items()}
    lines = "".join(f"- {fact}\n" for fact in facts)
    text = f"---\n{CardData(**values).to_yaml()}\n---\n# {title}\n\n{lines}{_SNIPPET.format(decoder=decoder)}"
    write_bytes(path, text.encode())
