"""Tell models apart: a digest of all that a network adds to a picture."""

from typing import Any

from sharding.files import digest_of
from training.dreambooth.sampling.networks import SdPictures
from training.tensor_file import digest_of_tensors

_SETTINGS = {
    "unet": ("attention_head_dim", "num_attention_heads"),
    "vae": ("scaling_factor", "latents_mean", "latents_std"),
    "text": ("hidden_act", "num_attention_heads", "eos_token_id"),
}
"""What weights do not say."""


def digest(networks: SdPictures) -> str:
    """Return the SHA-256 of the weights of UNet, VAE and text models, and of how they are used.

    Reads all of them: some 7 s for SDXL in fp32. Take it before training: class images come from the model that is
    started from. The weights' format counts, the device does not.
    """
    parts = {"unet": (networks.unet,), "vae": (networks.vae,), "text": tuple(networks.text.texts)}
    return digest_of(
        {
            "family": networks.family,
            "prediction": networks.prediction.kind,
            "zero_terminal_snr": networks.prediction.zero_terminal_snr,
            "clip_skip": networks.text.clip_skip,
            "max_tokens": networks.max_tokens,
            "strict_tokens": networks.strict_tokens,
            "vocabulary": sorted(networks.tokenizer.get_vocab().items()),
            "parts": {name: [_part(module, _SETTINGS[name]) for module in modules] for name, modules in parts.items()},
        }
    )


def _part(module: Any, settings: tuple[str, ...]) -> list[Any]:
    config = module.config if isinstance(module.config, dict) else module.config.to_dict()
    return [digest_of_tensors(module.state_dict()), *(config.get(name) for name in settings)]
