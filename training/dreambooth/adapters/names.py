"""What layers of Stable Diffusion with adapters are called, here and in files, and which get one.

Here layers have diffusers' names, and the text models' those of their live modules, which since transformers 5.6 have
no `text_model.` in a CLIPTextModel. kohya's files name SDXL's UNet as its original code does.
"""

from collections.abc import Iterable, Mapping

from torch import nn

from training.dreambooth.single_file.layout import Family
from training.dreambooth.single_file.text_names import with_prefix_name
from training.dreambooth.single_file.unet_names import unet_names
from training.dreambooth.text import SdText

UNET, TEXT, TEXT_2 = "unet", "text_encoder", "text_encoder_2"
PREFIXES: Mapping[str, str] = {UNET: "unet.", TEXT: "text.texts.0.", TEXT_2: "text.texts.1."}
"""Where components lie in an SdNetworks."""
_TRANSFORMERS = r"re:\.attentions\.\d+\."
PRESETS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    UNET: {
        "default": (_TRANSFORMERS,),
        "kohya": (_TRANSFORMERS,),
        "attention": ("*.to_q", "*.to_k", "*.to_v", "*.to_out.0"),
        "kohya_conv": (_TRANSFORMERS, r"re:\.(resnets|downsamplers|upsamplers)\.\d+\."),
        "conv_3x3": ("*.conv1", "*.conv2", "*.downsamplers.*.conv", "*.upsamplers.*.conv"),
    },
    TEXT: {"kohya": ("*.self_attn.*_proj", "*.mlp.fc?")},
}
"""kohya: every Linear and 1×1 convolution of Transformer2DModel, what networks.lora trains. kohya_conv: of
ResnetBlock2D, Downsample2D and Upsample2D, too, 3×3 convolutions among them (its conv_dim); conv_3x3 are those alone,
for a block with a rank of their own. Of text models CLIPAttention and CLIPMLP."""
KOHYA_PREFIXES: Mapping[Family, Mapping[str, tuple[str, ...]]] = {
    "sd1": {UNET: ("lora_unet",), TEXT: ("lora_te", "lora_te1")},
    "sd2": {UNET: ("lora_unet",), TEXT: ("lora_te", "lora_te1")},
    "sdxl": {UNET: ("lora_unet",), TEXT: ("lora_te1", "lora_te"), TEXT_2: ("lora_te2",)},
}
"""The first are written; the others are those of files that other programs converted."""


def base_version(family: Family, *, predicts_v: bool) -> str:
    """Return kohya's `ss_base_model_version`."""
    if family == "sdxl":
        return "sdxl_base_v1-0"
    return f"sd_{'v1' if family == 'sd1' else 'v2'}{'_v' if predicts_v else ''}"


def text_parts(family: Family) -> tuple[str, ...]:
    """Return a family's text models, in order."""
    return (TEXT, TEXT_2) if family == "sdxl" else (TEXT,)


def expanded(targets: Iterable[str], component: str) -> list[str]:
    """Return patterns, those of presets in place of their names."""
    presets = PRESETS[UNET if component == UNET else TEXT]
    return [pattern for target in targets for pattern in presets.get(target, (target,))]


def kohya_names(component: str, layers: Iterable[str], family: Family) -> dict[str, str]:
    """Return {layer: what kohya calls it, with dots}. layers: of a UNet, all that it has; see `unet_names`."""
    known = list(layers)
    if component != UNET:
        return {layer: with_prefix_name(layer) for layer in known}
    if family != "sdxl":
        return {layer: layer for layer in known}
    originals = unet_names(f"{layer}.weight" for layer in known)
    return {key.removesuffix(".weight"): name.removesuffix(".weight") for key, name in originals.items()}


def unread_layers(text: SdText, number: int) -> tuple[str, ...]:
    """Return what names of layers of a text model begin with whose output nothing reads: those that clip skip cuts."""
    module = text.texts[number]
    if hasattr(module, "text_projection"):  # the pooled vector comes from the last layer
        return ()
    inner: nn.Module = getattr(module, "text_model", module)
    root = "text_model." if inner is not module else ""
    num_layers = len(inner.encoder.layers)  # type: ignore[union-attr, arg-type]
    return tuple(f"{root}encoder.layers.{one}." for one in range(num_layers - text.clip_skip + 1, num_layers))
