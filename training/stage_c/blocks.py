"""The building blocks of the stage C network.

Attribute names are checkpoint keys (`channelwise.2.gamma`, `attention.attn.in_proj_weight`, ...) and must not change.
How the blocks are put together is in network.py.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

NORM_EPSILON = 1e-6
MAX_POSITIONS = 10_000

DropoutPlace = Literal["probabilities", "output", "none"]
"""Where dropout acts on attention."""


def timestep_embedding(r: Tensor, width: int) -> Tensor:
    """Embed noise levels r: (B,) in [0, 1] as (B, width) float32: sines, then cosines, of r * 10,000."""
    half = width // 2
    exponents = torch.arange(half, device=r.device, dtype=torch.float32) * (-math.log(MAX_POSITIONS) / (half - 1))
    angles = (r.float() * MAX_POSITIONS)[:, None] * exponents.exp()[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of (B, C, H, W), without learned scale or shift."""

    def forward(self, x: Tensor) -> Tensor:
        channels_last = x.permute(0, 2, 3, 1)
        return F.layer_norm(channels_last, (x.shape[1],), eps=NORM_EPSILON).permute(0, 3, 1, 2)


class GlobalResponseNorm(nn.Module):
    """Scale each channel of (B, H, W, C) by its share of the sample's energy.

    The norm spans the whole picture and is taken in float32: its square overflows float16.
    Source: Woo et al., "ConvNeXt V2", 2023, algorithm 1.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        energy = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)
        share = energy / (energy.mean(dim=-1, keepdim=True) + NORM_EPSILON)
        # gamma * (x * share) + beta + x, with the per-channel factor formed first: no second (B, H, W, C) product.
        scaled: Tensor = x * (1 + self.gamma * share) + self.beta
        return scaled.to(x.dtype)


def recomputable(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let a block compute its activations again in the backward pass where its `recomputes` is set.

    Inside of the block, so that hooks around its call (FSDP2's) run once: recomputing around them fails there.
    """

    @functools.wraps(forward)
    def wrapped(self: Any, *inputs: Tensor | None) -> Tensor:
        if self.recomputes and torch.is_grad_enabled():
            output: Tensor = checkpoint(functools.partial(forward, self), *inputs, use_reentrant=False)
            return output
        return forward(self, *inputs)

    return wrapped


class ResBlock(nn.Module):
    """Depthwise convolution, then a per-pixel MLP; `skip` joins the MLP's input where c_skip > 0."""

    recomputes = False

    def __init__(self, width: int, *, c_skip: int, dropout: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width)
        self.norm = ChannelNorm()
        self.channelwise = nn.Sequential(
            nn.Linear(width + c_skip, width * 4),
            nn.GELU(),
            GlobalResponseNorm(width * 4),
            nn.Dropout(dropout),
            nn.Linear(width * 4, width),
        )

    @recomputable
    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        hidden = self.norm(self.depthwise(x))
        if skip is not None:
            hidden = torch.cat([hidden, skip.to(hidden.dtype)], dim=1)
        mixed: Tensor = self.channelwise(hidden.permute(0, 2, 3, 1))
        return x + mixed.permute(0, 3, 1, 2)


class TimestepBlock(nn.Module):
    """Scale and shift by the noise level and the two unused conditions `sca` and `crp` of the published model."""

    recomputes = False

    def __init__(self, width: int, c_r: int) -> None:
        super().__init__()
        self.mapper = nn.Linear(c_r, width * 2)
        self.mapper_sca = nn.Linear(c_r, width * 2)
        self.mapper_crp = nn.Linear(c_r, width * 2)

    @recomputable
    def forward(self, x: Tensor, r_embeddings: Tensor) -> Tensor:
        """r_embeddings: (B, 3 * c_r) float32, for r, sca and crp."""
        r, sca, crp = r_embeddings.to(self.mapper.weight.dtype).chunk(3, dim=1)
        scale_shift: Tensor = self.mapper(r) + self.mapper_sca(sca) + self.mapper_crp(crp)
        # In the format of x: 1 + scale in bfloat16 would round the whole of x to eight bits.
        scale, shift = scale_shift.to(x.dtype)[:, :, None, None].chunk(2, dim=1)
        return x * (1 + scale) + shift


class PackedAttention(nn.Module):
    """Multi-head attention with q, k and v stacked in one weight, as in torch's nn.MultiheadAttention.

    Dropout acts in training mode only, on the attention probabilities unless `dropout_on` is set. No key mask.
    """

    dropout_on: DropoutPlace = "probabilities"

    def __init__(self, width: int, num_heads: int, *, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        """tokens: (B, N, C), context: (B, M, C) -> (B, N, C)."""
        width = tokens.shape[-1]
        q = F.linear(tokens, self.in_proj_weight[:width], self.in_proj_bias[:width])
        kv = F.linear(context, self.in_proj_weight[width:], self.in_proj_bias[width:])
        return self.mix(q, kv)

    def mix(self, q: Tensor, kv: Tensor) -> Tensor:
        """Attend. q: (B, N, C), kv: (B, M, 2 C), keys before values -> (B, N, C)."""
        q, k, v = (
            part.reshape(*part.shape[:2], self.num_heads, -1).transpose(1, 2) for part in (q, *kv.chunk(2, dim=-1))
        )
        is_dropped = self.training and self.dropout_on == "probabilities"
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if is_dropped else 0.0)
        projected: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return F.dropout(projected, self.dropout) if self.training and self.dropout_on == "output" else projected


class Attention2d(nn.Module):
    """Holds the attention under the name `attn`, which is part of the checkpoint's keys."""

    def __init__(self, width: int, num_heads: int, *, dropout: float) -> None:
        super().__init__()
        self.attn = PackedAttention(width, num_heads, dropout=dropout)

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        mixed: Tensor = self.attn(tokens, context)
        return mixed


class AttnBlock(nn.Module):
    """Attend from every position to all positions (self_attn) and to the conditioning tokens."""

    recomputes = False

    def __init__(self, width: int, c_cond: int, num_heads: int, *, self_attn: bool, dropout: float) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.norm = ChannelNorm()
        self.attention = Attention2d(width, num_heads, dropout=dropout)
        self.kv_mapper = nn.Sequential(nn.SiLU(), nn.Linear(c_cond, width))

    @recomputable
    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        context = self.kv_mapper(condition)
        if self.self_attn:
            context = torch.cat([tokens, context.to(tokens.dtype)], dim=1)
        mixed: Tensor = self.attention(tokens, context)
        return x + mixed.transpose(1, 2).reshape(x.shape)


class UpDownBlock(nn.Module):
    """A 1x1 convolution between two levels, with a bilinear change of size where `switch` is set."""

    def __init__(self, width_in: int, width_out: int, *, up: bool, switch: bool) -> None:
        super().__init__()
        mapping = nn.Conv2d(width_in, width_out, kernel_size=1)
        resize: nn.Module = nn.Identity()
        if switch:
            resize = nn.Upsample(scale_factor=2 if up else 0.5, mode="bilinear", align_corners=True)
        self.blocks = nn.ModuleList([resize, mapping] if up else [mapping, resize])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x
