"""Tiny stage C models with adapters and tokens, made of a RunConfig without files but those of the demo's models."""

from pathlib import Path
from typing import Any

import torch

from tests.training.toy import toy_config
from training.config import RunConfig
from training.stage_c.adapters import StageCAdapters
from training.stage_c.conditioning import Conditioning
from training.stage_c.formats import load_stage_c
from training.stage_c.model import StageCModel


def adapted(paths: dict[str, Path], **changes: Any) -> tuple[RunConfig, StageCModel, StageCAdapters, Conditioning]:
    """Return config, model, adapters and conditioning; changes: of the config, `lora` and `tokens` among them."""
    stage_c = {name: str(paths[name]) for name in ("text_encoder", "tokenizer", "effnet")}
    own = {**stage_c, "network": str(paths["stage_c"]), **changes.get("stage_c", {})}
    config = toy_config(**{**changes, "stage_c": own})
    network = load_stage_c(config.stage_c.network)
    network.set_dropout(0.0)
    network.clip_img_mapper.weight.requires_grad_(False)
    device, in_text = torch.device("cpu"), config.trains_in_text_encoder
    conditioning = Conditioning(config.stage_c, device=device, dtype=torch.float32, has_gradients=in_text)
    model = StageCModel(network, conditioning.text if in_text else None).train()
    return config, model, StageCAdapters(config, model, conditioning.tokenizer), conditioning


def shake(model: StageCModel, *, seed: int = 3) -> None:
    """Move all that is trained away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def inputs(
    conditioning: Conditioning, *captions: str, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return noised latents, noise levels and token windows for captions."""
    generator = torch.Generator().manual_seed(seed)
    num = len(captions)
    windows = conditioning.tokens(captions).windows
    return torch.randn(num, 16, 8, 8, generator=generator), torch.rand(num, generator=generator), windows


def predict(model: StageCModel, conditioning: Conditioning, *captions: str) -> torch.Tensor:
    """Return the model's prediction for captions."""
    x, r, windows = inputs(conditioning, *captions)
    states = None if model.text is not None else conditioning.states(windows)
    prediction: torch.Tensor = model(x, r, windows=windows, states=states, mask=True, clip_img=None)
    return prediction
