"""The EfficientNet encoder that turns pictures into stage C latents.

EfficientNetV2-S features, a 1x1 convolution to 16 channels and a fixed normalisation, with torchvision's key names
under `backbone.` so that published `effnet_encoder.safetensors` files load. Frozen: always in evaluation mode, weights
in float32 (float16 gives NaN). Latents are used as they come, without a scale factor.

Source: Tan and Le, "EfficientNetV2", 2021, table 4.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from training.weight_files import load_into, naming, read_tensors, write_tensors

PIXELS_PER_LATENT = 32
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Per stage of EfficientNetV2-S: expansion of the inner width, stride of the first block, fused (no squeeze-excitation).
EXPANSIONS = (1, 4, 4, 4, 6, 6)
STRIDES = (1, 2, 2, 2, 1, 2)
FUSED = (True, True, True, False, False, False)


@dataclass(frozen=True)
class EffNetConfig:
    """Widths and depths of the encoder; the defaults are EfficientNetV2-S. widths, depths: six stages each."""

    stem_width: int = 24
    widths: tuple[int, ...] = (24, 48, 64, 128, 160, 256)
    depths: tuple[int, ...] = (2, 4, 4, 6, 9, 15)
    head_width: int = 1280
    latent_channels: int = 16

    def __post_init__(self) -> None:
        if len(self.widths) != len(STRIDES) or len(self.depths) != len(STRIDES):
            raise ValueError(f"effnet config: widths {self.widths} and depths {self.depths} must have 6 entries each")


def config_from_state_dict(state_dict: Mapping[str, Tensor]) -> EffNetConfig:
    """Infer widths and depths from shapes. Raises ValueError if the keys are not an EfficientNetV2 encoder's."""
    try:
        depths = tuple(
            len({key.split(".")[2] for key in state_dict if key.startswith(f"backbone.{stage}.")})
            for stage in range(1, 7)
        )
        projections = ("0.0", "1.0", "1.0", "3.0", "3.0", "3.0")
        widths = tuple(
            state_dict[f"backbone.{stage}.0.block.{projection}.weight"].shape[0]
            for stage, projection in enumerate(projections, start=1)
        )
        return EffNetConfig(
            stem_width=state_dict["backbone.0.0.weight"].shape[0],
            widths=widths,
            depths=depths,
            head_width=state_dict["backbone.7.0.weight"].shape[0],
            latent_channels=state_dict["mapper.0.weight"].shape[0],
        )
    except KeyError as error:
        raise ValueError(f"effnet weights: key {error.args[0]!r} is missing; is this an effnet_encoder file?") from None


def _conv(
    width_in: int, width_out: int, *, kernel: int = 1, stride: int = 1, groups: int = 1, act: bool = True
) -> nn.Sequential:
    """Return convolution, batch norm and, with act, SiLU."""
    padding = (kernel - 1) // 2
    layers: list[nn.Module] = [
        nn.Conv2d(width_in, width_out, kernel, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(width_out, eps=1e-3),
    ]
    return nn.Sequential(*layers, nn.SiLU()) if act else nn.Sequential(*layers)


class SqueezeExcitation(nn.Module):
    """Scale channels by a gate computed from their means."""

    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean(dim=(2, 3), keepdim=True)
        return x * torch.sigmoid(self.fc2(nn.functional.silu(self.fc1(means))))


class InvertedBottleneck(nn.Module):
    """One MBConv or fused MBConv block, with a residual where the shape allows."""

    def __init__(self, width_in: int, width_out: int, *, expansion: int, stride: int, fused: bool) -> None:
        super().__init__()
        inner = width_in * expansion
        self.is_residual = stride == 1 and width_in == width_out
        if fused and expansion == 1:
            layers: list[nn.Module] = [_conv(width_in, width_out, kernel=3, stride=stride)]
        elif fused:
            layers = [_conv(width_in, inner, kernel=3, stride=stride), _conv(inner, width_out, act=False)]
        else:
            layers = [
                _conv(width_in, inner),
                _conv(inner, inner, kernel=3, stride=stride, groups=inner),
                SqueezeExcitation(inner, max(1, width_in // 4)),
                _conv(inner, width_out, act=False),
            ]
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.block(x)
        return x + hidden if self.is_residual else hidden


class EffNetEncoder(nn.Module):
    """Encode pictures as stage C latents; frozen, evaluation mode, float32 weights."""

    def __init__(self, config: EffNetConfig) -> None:
        super().__init__()
        self.config = config
        stages: list[nn.Module] = [_conv(3, config.stem_width, kernel=3, stride=2)]
        width_in = config.stem_width
        for width, depth, expansion, stride, fused in zip(
            config.widths, config.depths, EXPANSIONS, STRIDES, FUSED, strict=True
        ):
            blocks: list[nn.Module] = []
            for index in range(depth):
                first = stride if index == 0 else 1
                blocks.append(InvertedBottleneck(width_in, width, expansion=expansion, stride=first, fused=fused))
                width_in = width
            stages.append(nn.Sequential(*blocks))
        stages.append(_conv(width_in, config.head_width))
        self.backbone = nn.Sequential(*stages)
        self.mapper = nn.Sequential(
            nn.Conv2d(config.head_width, config.latent_channels, 1, bias=False),
            nn.BatchNorm2d(config.latent_channels, affine=False),
        )
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "EffNetEncoder":
        """Stay in evaluation mode: a parent's .train() must not make the batch norms learn."""
        return super().train(False)

    def forward(self, normalised: Tensor) -> Tensor:
        """normalised: (B, 3, H, W), ImageNet mean and deviation removed -> (B, 16, H/32, W/32)."""
        latents: Tensor = self.mapper(self.backbone(normalised))
        return latents

    @torch.no_grad()
    def encode(self, rgb: Tensor, *, compute: torch.dtype = torch.float32) -> Tensor:
        """Return latents (B, 16, H/32, W/32) float32 of rgb: (B, 3, H, W) in [0, 1], H and W multiples of 32.

        compute: float32, or bfloat16 for convolutions in bfloat16. Autocast from outside is switched off inside.
        Raises ValueError if the shape does not fit or the weights are not float32.
        """
        if rgb.ndim != 4 or rgb.shape[1] != 3 or rgb.shape[2] % PIXELS_PER_LATENT or rgb.shape[3] % PIXELS_PER_LATENT:
            raise ValueError(
                f"effnet encode: expected (B, 3, H, W) with H and W multiples of {PIXELS_PER_LATENT}, "
                f"got {tuple(rgb.shape)}"
            )
        if not rgb.is_floating_point():
            raise ValueError(f"effnet encode: expected floating point pixels in [0, 1], got {rgb.dtype}")
        dtype = next(self.parameters()).dtype
        if dtype != torch.float32:
            raise ValueError(f"effnet encode: weights are {dtype}; keep the encoder in float32")
        rgb = rgb.float()
        mean, std = (rgb.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        normalised = (rgb - mean) / std
        with torch.autocast(rgb.device.type, dtype=torch.bfloat16, enabled=compute == torch.bfloat16):
            return self.forward(normalised).float()


def load_effnet(path: Path, *, device: torch.device | str = "cpu") -> EffNetEncoder:
    """Load an effnet_encoder file, or the encoder out of a combined checkpoint; its widths come from the shapes.

    Raises FileNotFoundError, or WeightsError naming missing and unexpected keys.
    """
    state_dict, _ = read_tensors(path, anchor="backbone.0.0.weight", dtype=torch.float32)
    with naming(path), torch.device("meta"):
        encoder = EffNetEncoder(config_from_state_dict(state_dict))
    load_into(encoder, state_dict, source=path)
    return encoder.to(device)


def save_effnet(encoder: EffNetEncoder, path: Path) -> None:
    """Write the encoder in the published layout, float32."""
    write_tensors(path, encoder.state_dict())
