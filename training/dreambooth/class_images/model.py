"""Tell models apart: a digest of all that a network adds to a picture."""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from training.dreambooth.sampling.networks import SdPictures

_SETTINGS = {
    "unet": ("attention_head_dim", "num_attention_heads"),
    "vae": ("scaling_factor", "shift_factor", "latents_mean", "latents_std"),
    "text": ("hidden_act", "num_attention_heads", "eos_token_id"),
}
"""What weights do not say."""


def digest(networks: SdPictures) -> str:
    """Return the SHA-256 of the weights of UNet, VAE and text models, and of how they are used.

    Reads all of them: about 5 s for SDXL. Take it before training: class images come from the model that is started
    from. The weights' format counts, the device does not.
    """
    parts = {"unet": [networks.unet], "vae": [networks.vae], "text": list(networks.text.texts)}
    used = {
        "family": networks.family,
        "prediction": networks.prediction.kind,
        "zero_terminal_snr": networks.prediction.zero_terminal_snr,
        "clip_skip": networks.text.clip_skip,
        "max_tokens": networks.max_tokens,
        "vocabulary": networks.tokenizer.get_vocab(),
        "settings": {
            name: [_settings(module, _SETTINGS[name]) for module in modules] for name, modules in parts.items()
        },
    }
    sha = hashlib.sha256(json.dumps(used, sort_keys=True).encode())
    for name, modules in parts.items():
        for number, module in enumerate(modules):
            _add_weights(sha, f"{name}.{number}", module)
    return sha.hexdigest()


def _settings(module: Any, names: tuple[str, ...]) -> dict[str, Any]:
    config = module.config
    values = config if isinstance(config, dict) else config.to_dict()
    return {name: values.get(name) for name in names}


def _add_weights(sha: "hashlib._Hash", where: str, module: nn.Module) -> None:
    tensors: dict[str, Tensor] = module.state_dict()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{where}.{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy())
