"""Names of the UNet's parameters in the original layout (CompVis, Stability), from diffusers' names.

Follows from the order of layers: a level's residual blocks and, last, its down- or upsampler are numbered through.
Holds for SD 1, SD 2 and SDXL alike; layers per block and where attention is are read from the names themselves.
"""

import re
from collections.abc import Iterable

_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_IN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(
    r"(?P<side>down|up)_blocks\.(?P<level>\d+)\.(?P<kind>resnets|attentions|downsamplers|upsamplers)"
    r"\.(?P<number>\d+)\.(?P<rest>.+)"
)
_MIDDLE = re.compile(r"mid_block\.(?P<kind>resnets|attentions)\.(?P<number>\d+)\.(?P<rest>.+)")


def unet_names(keys: Iterable[str]) -> dict[str, str]:
    """Return {diffusers' key: original key} for all keys of one UNet. Raises ValueError for a key it does not know."""
    known = list(keys)
    blocks = [found for found in map(_BLOCK.fullmatch, known) if found]
    resnets = {(found["side"], found["level"], found["number"]) for found in blocks if found["kind"] == "resnets"}
    layers = sum(side == "down" and level == "0" for side, level, _ in resnets)
    attended = {found["level"] for found in blocks if found["side"] == "up" and found["kind"] == "attentions"}
    return {key: _name(key, layers, attended) for key in known}


def _name(key: str, layers: int, attended: set[str]) -> str:
    if found := _BLOCK.fullmatch(key):
        return _block_name(found, layers, attended)
    if found := _MIDDLE.fullmatch(key):
        place = 1 if found["kind"] == "attentions" else 2 * int(found["number"])
        return f"middle_block.{place}.{_rest(found)}"
    module, _, parameter = key.rpartition(".")
    if module in _OUTSIDE:
        return f"{_OUTSIDE[module]}.{parameter}"
    raise ValueError(f"{key}: no UNet of Stable Diffusion 1, 2 or XL has this parameter")


def _block_name(found: re.Match[str], layers: int, attended: set[str]) -> str:
    level, number = int(found["level"]), int(found["number"])
    if found["side"] == "down":
        first = 1 + level * (layers + 1)
        if found["kind"] == "downsamplers":
            return f"input_blocks.{first + layers}.0.op.{found['rest'].removeprefix('conv.')}"
        return f"input_blocks.{first + number}.{int(found['kind'] == 'attentions')}.{_rest(found)}"
    first = level * (layers + 1)
    if found["kind"] == "upsamplers":
        place = 2 if found["level"] in attended else 1
        return f"output_blocks.{first + layers}.{place}.{found['rest']}"
    return f"output_blocks.{first + number}.{int(found['kind'] == 'attentions')}.{_rest(found)}"


def _rest(found: re.Match[str]) -> str:
    if found["kind"] != "resnets":
        return found["rest"]
    module, _, parameter = found["rest"].partition(".")
    return f"{_IN_RESNET[module]}.{parameter}"
