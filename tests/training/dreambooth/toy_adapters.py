"""Toy models of Stable Diffusion with adapters and tokens, and what they predict."""

import functools

import torch

from tests.training.dreambooth.toy_sd import toy_text, toy_unet
from tests.training.toy import toy_config
from training.dreambooth.adapters.adapters import SdAdapters
from training.dreambooth.model import SdNetworks
from training.dreambooth.text import SdText, pad_ids, tokenize
from training.stage_c.text import load_tokenizer

FAMILIES = ("sd1", "sd2", "sdxl")
_CONV = {"name": "conv", "targets": ["conv_3x3"], "rank": 3, "alpha": 1.5, "learning_rate": 0.5}
KINDS = {
    "lora": {"rank": 4, "alpha": 1.0},
    "dora": {"kind": "dora", "rank": 2, "alpha": 3.0},
    "loha": {"kind": "loha", "rank": 2, "alpha": 4.0},
    "lokr": {"kind": "lokr", "rank": 2, "alpha": 2.0},
    "conv": {"targets": ["kohya_conv"], "rank": 2, "blocks": [_CONV]},
}


@functools.cache
def plain_tokenizer():
    """CLIP's tokenizer, to which nothing may be added."""
    return load_tokenizer("builtin")


def toy_networks(family, *, clip_skip=1):
    """The UNet and text models of a family, all in one module."""
    texts = [toy_text(act="gelu" if family == "sd2" else "quick_gelu")]
    if family == "sdxl":
        texts.append(toy_text(projection=True, act="gelu"))
    return SdNetworks(toy_unet(family), SdText(family, texts, clip_skip=clip_skip))


def adapted(family, *, train=("unet",), clip_skip=1, stages=(), **changes):
    """Return config, model, adapters and tokenizer; changes: tables of the config, `lora` and `tokens` among them."""
    if "lora" in changes:
        changes["lora"] = {"base_weights": "fp32", **changes["lora"]}
    recipe = {"model": "none", "train": train, "stages": stages}
    if stages:
        recipe["concepts"] = "none"
    config = toy_config(stage_c=None, dreambooth=recipe, **changes)
    model = toy_networks(family, clip_skip=clip_skip)
    tokenizer = load_tokenizer("builtin") if "tokens" in changes else plain_tokenizer()
    return config, model, SdAdapters(config, model, tokenizer, family=family), tokenizer


def shake(model, *, seed=3, size=0.05):
    """Move all that is trained away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def predict(model, tokenizer=None, caption="a [cat] with a hat"):
    """Return what a model predicts for one caption."""
    family, tokenizer = model.text.family, tokenizer or plain_tokenizer()
    windows = tuple(tokenize(tokenizer, [caption], max_tokens=75, pad_id=one).windows for one in pad_ids(family))
    noised = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    time_ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]]) if family == "sdxl" else None
    return model(noised, torch.tensor([500]), windows=windows, states=None, time_ids=time_ids)
