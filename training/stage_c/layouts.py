"""The key names of stage C weights in the three layouts in use, from one to another without changing a bit.

original: Stability's and ComfyUI's files, q, k and v stacked in `attention.attn.in_proj_weight`; also our network's.
kohya: that trainer's `-state` folders and checkpoints saved by ComfyUI, `attention.attn.to_q` / `to_k` / `to_v`.
diffusers: StableCascadeUNet, `attention.to_q` / `to_k` / `to_v` / `to_out.0`.
The other keys are the same everywhere. Names only: files are read and written in `formats`.
"""

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from training.weight_files import WeightsError

Layout = Literal["original", "kohya", "diffusers"]
ANCHOR = "clip_txt_mapper.weight"
"""A key that stage C has in every layout, and no other model."""


def detect_layout(keys: Iterable[str]) -> Layout:
    """Tell a state dict's layout by its attention keys. Raises WeightsError if there are none that are known."""
    names = list(keys)
    for marker, layout in (
        (".attention.attn.in_proj_weight", "original"),
        (".attention.attn.to_q.weight", "kohya"),
        (".attention.to_q.weight", "diffusers"),
    ):
        if any(name.endswith(marker) for name in names):
            return layout  # type: ignore[return-value]
    raise WeightsError(f"stage C weights: no attention keys among {len(names)}; this is another model, or a part of it")


def to_original(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename any of the three layouts to the original one; q, k and v are stacked, all else is passed through.

    Raises WeightsError if the layout is not known or one of q, k, v is missing.
    """
    layout = detect_layout(state_dict)
    if layout == "original":
        return dict(state_dict)
    infix = ".attention.attn.to_" if layout == "kohya" else ".attention.to_"
    result: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        block, _, rest = key.partition(infix)
        if not rest:
            result[key] = value
        elif rest.startswith("out.0."):
            result[f"{block}.attention.attn.out_proj.{rest.removeprefix('out.0.')}"] = value
        elif rest.startswith("q."):
            kind = rest.removeprefix("q.")
            parts = [f"{block}{infix}{letter}.{kind}" for letter in "qkv"]
            missing = [part for part in parts if part not in state_dict]
            if missing:
                raise WeightsError(f"stage C weights: {missing} missing beside {key!r}; the file is incomplete")
            packed = torch.cat([state_dict[part] for part in parts])
            result[f"{block}.attention.attn.in_proj_{kind}"] = packed
        elif rest[:2] not in ("k.", "v."):
            result[key] = value
    return result


def from_original(state_dict: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Rename the original layout to another; the parts of q, k and v are views of the same memory.

    Raises ValueError for an unknown layout.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be one of {get_args(Layout)}, got {layout!r}")
    if layout == "original":
        return dict(state_dict)
    result: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        block, marker, kind = key.partition(".attention.attn.in_proj_")
        if marker:
            infix = ".attention.attn.to_" if layout == "kohya" else ".attention.to_"
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                result[f"{block}{infix}{letter}.{kind}"] = part
        elif layout == "diffusers":
            result[key.replace(".attention.attn.out_proj.", ".attention.to_out.0.")] = value
        else:
            result[key] = value
    return result
