"""The previewer: a small decoder from stage C latents to pictures an eighth of the final size.

Reads published `previewer.safetensors` files. Frozen: always in evaluation mode and float32. Not stage B and A, which
make the real pictures.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from training.weight_files import load_into, naming, read_tensors, write_tensors

UPSAMPLING = 8


@dataclass(frozen=True)
class PreviewerConfig:
    """Widths of the previewer: before upsampling and after each of the three doublings."""

    latent_channels: int = 16
    widths: tuple[int, int, int, int] = (512, 256, 128, 128)


def config_from_state_dict(state_dict: Mapping[str, Tensor]) -> PreviewerConfig:
    """Infer widths from shapes. Raises ValueError if the keys are not a previewer's."""
    try:
        first = state_dict["blocks.0.weight"].shape
        second, third, fourth = (state_dict[f"blocks.{index}.weight"].shape[1] for index in (6, 12, 18))
        return PreviewerConfig(latent_channels=first[1], widths=(first[0], second, third, fourth))
    except KeyError as error:
        raise ValueError(f"previewer weights: key {error.args[0]!r} is missing; is this a previewer file?") from None


class Previewer(nn.Module):
    """Decode latents to small pictures; frozen, evaluation mode, float32."""

    def __init__(self, config: PreviewerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.widths[0]
        convolutions: list[nn.Conv2d | nn.ConvTranspose2d] = [
            nn.Conv2d(config.latent_channels, width, 1),
            nn.Conv2d(width, width, 3, padding=1),
        ]
        for wider in config.widths[1:]:
            convolutions.append(nn.ConvTranspose2d(width, wider, 2, stride=2))
            convolutions.append(nn.Conv2d(wider, wider, 3, padding=1))
            width = wider
        layers: list[nn.Module] = []
        for convolution in convolutions:
            layers += [convolution, nn.GELU(), nn.BatchNorm2d(convolution.out_channels)]
        self.blocks = nn.Sequential(*layers, nn.Conv2d(width, 3, 1))
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "Previewer":
        """Stay in evaluation mode: a parent's .train() must not make the batch norms learn."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, latents: Tensor) -> Tensor:
        """latents: (B, 16, H, W) -> RGB (B, 3, 8 H, 8 W) float32 in [0, 1]."""
        with torch.autocast(latents.device.type, enabled=False):
            rgb: Tensor = self.blocks(latents.float())
            return rgb.clamp(0, 1)


def load_previewer(path: Path, *, device: torch.device | str = "cpu") -> Previewer:
    """Load a previewer file; its widths come from the shapes.

    Raises FileNotFoundError, or WeightsError naming missing and unexpected keys.
    """
    state_dict, _ = read_tensors(path, anchor="blocks.24.weight", dtype=torch.float32)
    with naming(path), torch.device("meta"):
        previewer = Previewer(config_from_state_dict(state_dict))
    load_into(previewer, state_dict, source=path)
    return previewer.to(device)


def save_previewer(previewer: Previewer, path: Path) -> None:
    """Write the previewer in the published layout, float32."""
    write_tensors(path, previewer.state_dict())
