"""Stable Diffusion models of toy size, of the true classes: SD 1, SD 2 and SDXL."""

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

ATTENDED = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
UNETS = {
    "sd1": {"cross_attention_dim": 64, "attention_head_dim": 8},
    "sd2": {"cross_attention_dim": 64, "attention_head_dim": [1, 2], "use_linear_projection": True},
    "sdxl": {
        "cross_attention_dim": 128,
        "attention_head_dim": [1, 2],
        "use_linear_projection": True,
        "transformer_layers_per_block": [1, 2],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64 + 6 * 8,
    },
}


def toy_unet(family, **changes):
    """A UNet of two levels: attention in the first (SD 1, SD 2) or the second (SDXL), as in the full sizes."""
    torch.manual_seed(0)
    attended = [family != "sdxl", family == "sdxl"]
    settings = {
        "sample_size": 8,
        "block_out_channels": (64, 128),
        "layers_per_block": 2,
        "down_block_types": tuple(ATTENDED[0] if one else "DownBlock2D" for one in attended),
        "up_block_types": tuple(ATTENDED[1] if one else "UpBlock2D" for one in reversed(attended)),
        **UNETS[family],
    }
    return UNet2DConditionModel(**{**settings, **changes}).eval()


def toy_vae():
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        layers_per_block=2,
    ).eval()


def toy_text(*, projection=False, act="quick_gelu", width=64):
    torch.manual_seed(2)
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=width, intermediate_size=128, num_hidden_layers=3, num_attention_heads=1,
        max_position_embeddings=77, projection_dim=64, hidden_act=act, bos_token_id=49406, eos_token_id=49407,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()
