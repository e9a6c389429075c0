"""Names and shapes of the VAE's parameters in the original layout, from diffusers' names."""

import re
from collections.abc import Iterable

from torch import Tensor

_IN_RESNET = {"conv_shortcut": "nin_shortcut"}
_IN_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",  # diffusers before 0.18
}
_BLOCK = re.compile(
    r"(?P<half>encoder|decoder)\.(?:down|up)_blocks\.(?P<level>\d+)\.(?P<kind>resnets|downsamplers|upsamplers)"
    r"\.(?P<number>\d+)\.(?P<rest>.+)"
)
_MIDDLE = re.compile(
    r"(?P<half>encoder|decoder)\.mid_block\.(?P<kind>resnets|attentions)\.(?P<number>\d+)\.(?P<rest>.+)"
)


def vae_names(keys: Iterable[str]) -> dict[str, str]:
    """Return {diffusers' key: original key} for all keys of one VAE. Raises ValueError for a key it does not know."""
    known = list(keys)
    levels = 1 + max(int(found["level"]) for found in map(_BLOCK.fullmatch, known) if found)
    return {key: _name(key, levels) for key in known}


def _name(key: str, levels: int) -> str:
    if found := _BLOCK.fullmatch(key):
        level, rest = int(found["level"]), found["rest"]
        place = f"encoder.down.{level}" if found["half"] == "encoder" else f"decoder.up.{levels - 1 - level}"
        if found["kind"] == "resnets":
            module, _, parameter = rest.partition(".")
            return f"{place}.block.{found['number']}.{_IN_RESNET.get(module, module)}.{parameter}"
        return f"{place}.{found['kind'].removesuffix('rs').removesuffix('e')}e.{rest}"
    if found := _MIDDLE.fullmatch(key):
        module, _, parameter = found["rest"].rpartition(".")
        if found["kind"] == "resnets":
            return f"{found['half']}.mid.block_{int(found['number']) + 1}.{_IN_RESNET.get(module, module)}.{parameter}"
        return f"{found['half']}.mid.attn_1.{_IN_ATTENTION[module]}.{parameter}"
    if key.startswith(("quant_conv.", "post_quant_conv.")) or re.fullmatch(
        r"(encoder|decoder)\.conv_(in|out)\..+", key
    ):
        return key
    if found := re.fullmatch(r"(encoder|decoder)\.conv_norm_out\.(.+)", key):
        return f"{found[1]}.norm_out.{found[2]}"
    raise ValueError(f"{key}: no VAE of Stable Diffusion has this parameter")


def vae_tensor(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor in the original's shape: its attention layers are convolutions of 1 x 1. name: the original's."""
    is_attention = re.search(r"\.mid\.attn_1\.(q|k|v|proj_out)\.weight$", name) is not None
    return tensor[:, :, None, None] if is_attention and tensor.dim() == 2 else tensor
