"""What layers of stage C with adapters are called, here and in files, and which get one by default.

Here a network's attention has `attention.attn.in_proj`, or `to_q`, `to_k` and `to_v` (`adaptable`). kohya's files know
the latter, diffusers calls them `attention.to_q`, the official code numbers `out_proj` and `in_proj` of each block.
"""

from collections.abc import Iterable, Mapping, Sequence

from training.lora.adapter import Adapter, AdapterError
from training.lora.packing import packed, unpacked

NETWORK, TEXT = "network", "text_encoder"
_OFFICIAL = ("*.attention.attn.in_proj", "*.attention.attn.out_proj")
PRESETS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    NETWORK: {
        "default": _OFFICIAL,
        "official": _OFFICIAL,
        "kohya": ("re:^(?!clip_img_mapper$)",),
    },
    TEXT: {"kohya": ("*.self_attn.*_proj", "*.mlp.fc?")},
}
"""Official: module_filters ['.attn']. kohya: every Linear and every Conv2d that is not grouped; of the text model
CLIPAttention and CLIPMLP. The image mapper is left out: without images it would learn nothing."""
KOHYA_PREFIXES: Mapping[str, tuple[str, ...]] = {
    NETWORK: ("lora_unet", "lora_prior_unet"),
    TEXT: ("lora_te", "lora_te2", "lora_prior_te"),
}
"""The first are written; others are those of other trainers' stage C files."""
_TOGETHER, _APART = ".attention.attn.in_proj", tuple(f".attention.attn.to_{letter}" for letter in "qkv")


def clip_layers(num_layers: int) -> list[str]:
    """Return the names of a text model's layers, for files that are read without one."""
    parts = [f"self_attn.{letter}_proj" for letter in ("q", "k", "v", "out")] + ["mlp.fc1", "mlp.fc2"]
    return [f"text_model.encoder.layers.{number}.{part}" for number in range(num_layers) for part in parts]


def expanded(targets: Iterable[str], component: str) -> list[str]:
    """Return patterns, those of presets in place of their names."""
    presets = PRESETS[component]
    return [pattern for target in targets for pattern in presets.get(target, (target,))]


def is_together(patterns: Iterable[str]) -> bool:
    """Tell whether patterns want q, k and v in one layer."""
    return any("in_proj" in pattern for pattern in patterns)


def apart(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """Return adapters of q, k and v, each its own. Raises AdapterError for other kinds than LoRA on `in_proj`."""
    result: dict[str, Adapter] = {}
    for name, adapter in adapters.items():
        if name.endswith(_TOGETHER):
            block = name.removesuffix(_TOGETHER)
            result |= {block + end: one for end, one in zip(_APART, unpacked(adapter), strict=True)}
        else:
            result[name] = adapter
    return result


def together(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """Return adapters with one for q, k and v. Raises AdapterError where only some of the three have one."""
    result = {}
    for name, adapter in adapters.items():
        end = next((end for end in _APART if name.endswith(end)), None)
        if end is None:
            result[name] = adapter
            continue
        block = name.removesuffix(end)
        if missing := [block + other for other in _APART if block + other not in adapters]:
            raise AdapterError(f"{name} has an adapter and {missing[0]} has not: they cannot be put together")
        if end == _APART[0]:
            result[block + _TOGETHER] = packed([adapters[block + other] for other in _APART])
    return result


def to_diffusers(name: str) -> str:
    """Return diffusers' name of a layer with q, k and v apart."""
    return name.replace(".attention.attn.out_proj", ".attention.to_out.0").replace(".attention.attn.", ".attention.")


def from_diffusers(name: str) -> str:
    """Return our name of a layer that diffusers names."""
    if ".attention.attn." in name:
        return name
    return (
        name.replace(".attention.to_out.0", ".attention.to_out")
        .replace(".attention.to_out", ".attention.attn.out_proj")
        .replace(".attention.to_", ".attention.attn.to_")
    )


def official_order(names: Sequence[str]) -> list[str]:
    """Return layers as the official code meets them, of `names` in the order of a layered network's modules."""
    return [_joined(name) for name in names if not name.endswith(_APART[1:])]


def _joined(name: str) -> str:
    return name.removesuffix(_APART[0]) + _TOGETHER if name.endswith(_APART[0]) else name
