"""The text models in the original layout: CLIP-L word for word, OpenCLIP (SD 2, SDXL) with packed attention."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)")
_RESBLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
_IN_LAYER = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_OUTSIDE = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def with_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a live CLIP text model's tensors under the names of files.

    transformers 5.6 and later leave `text_model.` out of a CLIPTextModel's names in memory; files keep it.
    """
    return {with_prefix_name(key): tensor for key, tensor in state_dict.items() if not key.endswith("position_ids")}


def with_prefix_name(key: str) -> str:
    """Return a live CLIP text model's parameter name as files have it."""
    return key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}"


def openclip_text(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a Hugging Face CLIP text model in OpenCLIP's names: q, k and v stacked, the projection transposed.

    Raises ValueError for a key it does not know.
    """
    found: dict[str, Tensor] = {}
    for key, tensor in with_prefix(state_dict).items():
        if key in _OUTSIDE:
            found[_OUTSIDE[key]] = tensor
        elif key == "text_projection.weight":
            found["text_projection"] = tensor.T.contiguous()
        elif layer := _LAYER.fullmatch(key):
            module, _, parameter = layer[2].rpartition(".")
            if module.removeprefix("self_attn.") in PROJECTIONS:
                continue
            if module not in _IN_LAYER:
                raise ValueError(f"{key}: no CLIP text model has this parameter")
            found[f"transformer.resblocks.{layer[1]}.{_IN_LAYER[module]}.{parameter}"] = tensor
        else:
            raise ValueError(f"{key}: no CLIP text model has this parameter")
    return found | _packed(with_prefix(state_dict))


def _packed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    layers = {int(found[1]) for found in map(_LAYER.fullmatch, tensors) if found}
    return {
        f"transformer.resblocks.{layer}.attn.in_proj_{parameter}": torch.cat(
            [tensors[f"text_model.encoder.layers.{layer}.self_attn.{one}.{parameter}"] for one in PROJECTIONS]
        )
        for layer in sorted(layers)
        for parameter in ("weight", "bias")
    }


def from_openclip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return OpenCLIP's tensors in Hugging Face's names: the inverse of `openclip_text`, without what is not used."""
    inside = {theirs: ours for ours, theirs in _IN_LAYER.items()}
    outside = {theirs: ours for ours, theirs in _OUTSIDE.items()}
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key in outside:
            found[outside[key]] = tensor
        elif key == "text_projection":
            found["text_projection.weight"] = tensor.T.contiguous()
        elif layer := _RESBLOCK.fullmatch(key):
            place = f"text_model.encoder.layers.{layer[1]}."
            if packed := re.fullmatch(r"attn\.in_proj_(weight|bias)", layer[2]):
                thirds = zip(PROJECTIONS, tensor.chunk(3), strict=True)
                found |= {f"{place}self_attn.{one}.{packed[1]}": third.clone() for one, third in thirds}
            else:
                module, _, parameter = layer[2].rpartition(".")
                found[f"{place}{inside[module]}.{parameter}"] = tensor
    return found
