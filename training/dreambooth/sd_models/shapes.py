"""Settings of diffusers' and transformers' classes, read off the shapes in a single file.

What shapes do not tell is what all published models have in common: eight heads in SD 1 and heads of 64 elsewhere,
CLIP-L's quick_gelu and OpenCLIP's gelu, the scale of latents.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from training.dreambooth.single_file.layout import TEXT_PREFIXES, UNET_PREFIX, VAE_PREFIX, Family
from training.weight_files import WeightsError

Shapes = Mapping[str, tuple[int, ...]]
_HEAD_WIDTH = 64
_SD1_HEADS = 8
LATENT_SCALE: Mapping[Family, float] = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}
_SAMPLE_SIZE: Mapping[Family, int] = {"sd1": 64, "sd2": 96, "sdxl": 128}
_BOS, _EOS = 49406, 49407
_OTHERS: Mapping[str, str] = {
    "a Stable Diffusion 3": "joint_blocks.0.x_block.",
    "a Flux": "double_blocks.0.img_attn.",
    "a Stable Cascade (recipe stage_c)": "down_blocks.0.0.channelwise.",
    "SDXL's refiner": "conditioner.embedders.0.model.",
}
"""Part of a key by which models of other families are known."""


def detect_family(keys: Iterable[str], *, name: str) -> Family:
    """Return the family of a single file by its text models. Raises WeightsError when it is none of the three."""
    known = list(keys)
    for kind, sign in _OTHERS.items():
        if any(sign in key for key in known):
            raise WeightsError(f"{name}: {kind}, which is not trained here: Stable Diffusion 1, 2 and XL are")
    for family in ("sdxl", "sd2", "sd1"):
        prefixes = [prefix for prefix, _ in TEXT_PREFIXES[family]]
        if all(any(key.startswith(prefix) for key in known) for prefix in prefixes):
            return family
    shown = ", ".join(sorted(known)[:5])
    raise WeightsError(
        f"{name}: no text model of Stable Diffusion 1, 2 or XL in it, so it is no whole model of these; it starts with "
        f"{shown}"
    )


def unet_settings(shapes: Shapes, family: Family) -> dict[str, Any]:
    """Return what UNet2DConditionModel is made with. Raises WeightsError for inpainting models and other builds."""
    own = {key.removeprefix(UNET_PREFIX): shape for key, shape in shapes.items() if key.startswith(UNET_PREFIX)}
    if "input_blocks.0.0.weight" not in own:
        raise WeightsError(f"no key {UNET_PREFIX}input_blocks.0.0.weight: the file holds no UNet")
    if (channels_in := own["input_blocks.0.0.weight"][1]) != 4:
        raise WeightsError(
            f"the UNet takes {channels_in} channels, not 4: an inpainting or editing model, which is not trained here"
        )
    samplers = sorted(int(key.split(".")[1]) for key in own if key.endswith(".0.op.weight"))
    layers = samplers[0] - 1
    levels = len(samplers) + 1
    firsts = [f"input_blocks.{1 + level * (layers + 1)}" for level in range(levels)]
    channels = tuple(own[f"{first}.0.out_layers.3.weight"][0] for first in firsts)
    depths = [_count(own, f"{first}.1.transformer_blocks.") for first in firsts]
    attended = [depth > 0 for depth in depths]
    middle = f"{firsts[attended.index(True)]}.1"
    settings: dict[str, Any] = {
        "sample_size": _SAMPLE_SIZE[family],
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": tuple("CrossAttnDownBlock2D" if one else "DownBlock2D" for one in attended),
        "up_block_types": tuple("CrossAttnUpBlock2D" if one else "UpBlock2D" for one in reversed(attended)),
        "cross_attention_dim": own[f"{middle}.transformer_blocks.0.attn2.to_k.weight"][1],
        "use_linear_projection": len(own[f"{middle}.proj_in.weight"]) == 2,
        "attention_head_dim": _SD1_HEADS if family == "sd1" else [max(1, width // _HEAD_WIDTH) for width in channels],
    }
    if family == "sd2":
        settings["upcast_attention"] = True  # 2.1 overflows without it in fp16, and no key tells 2.1
    if max(depths) > 1:
        settings["transformer_layers_per_block"] = [max(depth, 1) for depth in depths]
    if family == "sdxl":
        added = own["label_emb.0.0.weight"][1]
        pooled = shapes[f"{TEXT_PREFIXES['sdxl'][1][0]}text_projection"][1]
        settings |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (added - pooled) // 6,
            "projection_class_embeddings_input_dim": added,
        }
    return settings


def vae_settings(shapes: Shapes, family: Family) -> dict[str, Any]:
    """Return what AutoencoderKL is made with. Raises WeightsError when the file holds no VAE."""
    own = {key.removeprefix(VAE_PREFIX): shape for key, shape in shapes.items() if key.startswith(VAE_PREFIX)}
    if "quant_conv.weight" not in own:
        raise WeightsError(f"no key {VAE_PREFIX}quant_conv.weight: the file holds no VAE; name one (dreambooth.vae)")
    levels = _count(own, "encoder.down.")
    return {
        "block_out_channels": tuple(own[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(levels)),
        "layers_per_block": _count(own, "encoder.down.0.block."),
        "latent_channels": own["quant_conv.weight"][0] // 2,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "sample_size": 8 * _SAMPLE_SIZE[family],
        "scaling_factor": LATENT_SCALE[family],
    }


def text_settings(shapes: Shapes, prefix: str, *, skips_last_layer: bool = False) -> dict[str, Any]:
    """Return what CLIPTextConfig is made with, for the text model behind `prefix`.

    skips_last_layer: SD 2's last layer is never used, and diffusers' encoder does not have it.
    """
    own = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    if is_openclip := "positional_embedding" in own:
        positions, width = own["positional_embedding"]
        layers, inner = _count(own, "transformer.resblocks."), own["transformer.resblocks.0.mlp.c_fc.weight"][0]
        words = own["token_embedding.weight"][0]
        projection = own["text_projection"][1] if "text_projection" in own else width
    else:
        positions, width = own["text_model.embeddings.position_embedding.weight"]
        layers, inner = (
            _count(own, "text_model.encoder.layers."), own["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        )  # fmt: skip
        words, projection = own["text_model.embeddings.token_embedding.weight"][0], width
    return {
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers - skips_last_layer,
        "num_attention_heads": max(1, width // _HEAD_WIDTH),
        "max_position_embeddings": positions,
        "projection_dim": projection,
        "hidden_act": "gelu" if is_openclip else "quick_gelu",
        "bos_token_id": _BOS,
        "eos_token_id": _EOS,
    }


def _count(keys: Iterable[str], prefix: str) -> int:
    """Return one more than the highest number that stands behind the prefix; 0 when none does."""
    numbers = {key.removeprefix(prefix).partition(".")[0] for key in keys if key.startswith(prefix)}
    return 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)
