"""The stage C network of Stable Cascade, in the key layout of the original checkpoints.

Pure torch, no diffusers: training runs on this module and `formats.py` renames for others. Names of parameters
(`down_blocks.0.2.attention.attn.in_proj_weight`, ...) are the file format, so attribute names here must not change.
It does not know about noise schedules, losses or text models.

Images of different sizes cannot share a batch by padding: the response normalisation and the attention see every
position and there is no mask.

Source: Pernias et al., "Würstchen: An Efficient Architecture for Large-Scale Text-to-Image Diffusion Models", 2023,
and the published stage C checkpoints, whose key names and shapes this module reproduces.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.stage_c.blocks import (
    NORM_EPSILON,
    AttnBlock,
    ChannelNorm,
    DropoutPlace,
    PackedAttention,
    ResBlock,
    TimestepBlock,
    UpDownBlock,
    timestep_embedding,
)
from training.stage_c.network_shape import StageCConfig, config_from_state_dict

__all__ = ["StageCConfig", "StageCNetwork", "config_from_state_dict"]


class StageCNetwork(nn.Module):
    """Predict the noise in stage C latents, given noise level, text and image conditioning.

    Weights are initialised as the published training code does: linear and convolution weights Xavier uniform,
    biases 0, conditioning mappers normal (0.02), input convolution Xavier with gain 0.02, last layer of each ResBlock
    times sqrt(1 / number of down blocks), timestep mappers 0, output convolution 0.
    """

    def __init__(self, config: StageCConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.residual_dtype: torch.dtype | None = None
        """Of what runs from block to block. None: float32 under autocast, else the weights' format."""
        widths, last = config.c_hidden, len(config.c_hidden) - 1

        self.clip_txt_mapper = nn.Linear(config.c_clip_text, config.c_cond)
        self.clip_txt_pooled_mapper = nn.Linear(config.c_clip_text_pooled, config.c_cond * config.c_clip_seq)
        self.clip_img_mapper = nn.Linear(config.c_clip_img, config.c_cond * config.c_clip_seq)
        self.embedding = nn.Sequential(
            nn.PixelUnshuffle(config.patch_size),
            nn.Conv2d(config.c_in * config.patch_size**2, widths[0], kernel_size=1),
            ChannelNorm(),
        )

        self.down_blocks, self.down_downscalers = nn.ModuleList(), nn.ModuleList()
        for level, count in enumerate(config.blocks_down):
            self.down_blocks.append(self._make_level(level, count, c_skip=0))
            self.down_downscalers.append(
                nn.Identity()
                if level == 0
                else nn.Sequential(
                    ChannelNorm(),
                    UpDownBlock(widths[level - 1], widths[level], up=False, switch=config.switch_level[level - 1]),
                )
            )

        self.up_blocks, self.up_upscalers = nn.ModuleList(), nn.ModuleList()
        for level, count in zip(reversed(range(len(widths))), config.blocks_up, strict=True):
            self.up_blocks.append(self._make_level(level, count, c_skip=0 if level == last else widths[level]))
            self.up_upscalers.append(
                nn.Identity()
                if level == 0
                else nn.Sequential(
                    ChannelNorm(),
                    UpDownBlock(widths[level], widths[level - 1], up=True, switch=config.switch_level[level - 1]),
                )
            )

        self.clf = nn.Sequential(
            ChannelNorm(),
            nn.Conv2d(widths[0], config.c_out * config.patch_size**2, kernel_size=1),
            nn.PixelShuffle(config.patch_size),
        )
        self._init_weights()

    @property
    def _input_convolution(self) -> nn.Conv2d:
        return self.embedding[1]  # type: ignore[return-value]  # or an adapter around it

    @property
    def _output_convolution(self) -> nn.Conv2d:
        layer = self.clf[1]
        assert isinstance(layer, nn.Conv2d)
        return layer

    def _make_level(self, level: int, count: int, *, c_skip: int) -> nn.ModuleList:
        config, width, dropout = self.config, self.config.c_hidden[level], self.config.dropout[level]
        blocks = nn.ModuleList()
        for index in range(count):
            blocks.append(ResBlock(width, c_skip=c_skip if index == 0 else 0, dropout=dropout))
            blocks.append(TimestepBlock(width, config.c_r))
            heads = config.num_heads[level]
            blocks.append(AttnBlock(width, config.c_cond, heads, self_attn=config.self_attn, dropout=dropout))
        return blocks

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, PackedAttention):
                nn.init.xavier_uniform_(module.in_proj_weight)
        for mapper in (self.clip_txt_mapper, self.clip_txt_pooled_mapper, self.clip_img_mapper):
            nn.init.normal_(mapper.weight, std=0.02)
        nn.init.xavier_uniform_(self._input_convolution.weight, gain=0.02)
        nn.init.zeros_(self._output_convolution.weight)
        for block in self.iter_blocks():
            if isinstance(block, ResBlock):
                last = block.channelwise[-1]
                assert isinstance(last, nn.Linear)
                with torch.no_grad():
                    last.weight.mul_(math.sqrt(1 / sum(self.config.blocks_down)))
            elif isinstance(block, TimestepBlock):
                for mapper in (block.mapper, block.mapper_sca, block.mapper_crp):
                    nn.init.zeros_(mapper.weight)

    def iter_blocks(self) -> Iterator[nn.Module]:
        """Yield every Res, Timestep and Attn block in forward order: the units for sharding and checkpointing."""
        for level in (*self.down_blocks, *self.up_blocks):
            yield from level.children()

    def set_dropout(self, probability: float, *, attention: DropoutPlace = "probabilities") -> None:
        """Use one dropout probability in all blocks, for hidden layers and, at that place, attention."""
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = probability
            elif isinstance(module, PackedAttention):
                module.dropout, module.dropout_on = probability, attention

    def enable_gradient_checkpointing(self) -> None:
        """Recompute every block in the backward pass instead of keeping its activations."""
        self.gradient_checkpointing = True
        for block in self.iter_blocks():
            assert isinstance(block, ResBlock | TimestepBlock | AttnBlock)
            block.recomputes = True

    def condition_tokens(self, clip_text: Tensor, clip_text_pooled: Tensor, clip_img: Tensor | None) -> Tensor:
        """Return the conditioning sequence (B, T + seq * P + seq * I, c_cond); see forward for the inputs."""
        config, dtype = self.config, self.clip_txt_mapper.weight.dtype
        if clip_text_pooled.ndim == 2:
            clip_text_pooled = clip_text_pooled[:, None]
        if clip_img is None:
            clip_img = clip_text.new_zeros(clip_text.shape[0], 1, config.c_clip_img)
        elif clip_img.ndim == 2:
            clip_img = clip_img[:, None]
        parts = [self.clip_txt_mapper(clip_text.to(dtype))]
        for mapper, values in ((self.clip_txt_pooled_mapper, clip_text_pooled), (self.clip_img_mapper, clip_img)):
            mapped: Tensor = mapper(values.to(dtype))  # (B, N, seq * c_cond): each input makes seq tokens
            parts.append(mapped.reshape(mapped.shape[0], -1, config.c_cond))
        return F.layer_norm(torch.cat(parts, dim=1), (config.c_cond,), eps=NORM_EPSILON)

    def forward(
        self,
        x: Tensor,
        r: Tensor,
        clip_text: Tensor,
        clip_text_pooled: Tensor,
        clip_img: Tensor | None = None,
        *,
        sca: Tensor | None = None,
        crp: Tensor | None = None,
    ) -> Tensor:
        """Return the predicted noise (B, c_out, H, W), in the dtype the network computes in.

        x: noised latents (B, c_in, H, W). r: (B,) noise level from `gdf.noise_level`, float32 or wider.
        clip_text: (B, T, c_clip_text), pre-norm states. clip_text_pooled: (B, 1, c_clip_text_pooled).
        clip_img: (B, c_clip_img) or (B, I, c_clip_img); None means zeros, as in all published finetunes, which gives
        `clip_img_mapper.weight` an exact zero gradient. sca, crp: (B,), None means zeros.

        Raises ValueError if r is narrower than float32 (r * 10,000 would be quantised to a few values).
        """
        if r.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"stage C forward: r must be float32, got {r.dtype}; with FSDP2 set cast_forward_inputs=False"
            )
        zeros = torch.zeros_like(r)
        conditions = (r, zeros if sca is None else sca, zeros if crp is None else crp)
        r_embeddings = torch.cat([timestep_embedding(value, self.config.c_r) for value in conditions], dim=1)
        condition = self.condition_tokens(clip_text, clip_text_pooled, clip_img)

        # Convolutions give the compute format. What is added up over all blocks must not be rounded to it each time.
        residual = self._residual_dtype(x.device)
        x = self.embedding(x.to(self._input_convolution.weight.dtype)).to(residual)
        skips: list[Tensor] = []
        for blocks, downscaler in zip(self.down_blocks, self.down_downscalers, strict=True):
            x = self._run_level(blocks, downscaler(x).to(residual), r_embeddings, condition, skip=None)
            skips.append(x)
        skips.pop()  # the innermost level goes on as x
        for index, (blocks, upscaler) in enumerate(zip(self.up_blocks, self.up_upscalers, strict=True)):
            skip = skips.pop() if index else None
            if skip is not None and x.shape[2:] != skip.shape[2:]:
                x = F.interpolate(x.float(), skip.shape[2:], mode="bilinear", align_corners=True).to(x.dtype)
            x = upscaler(self._run_level(blocks, x, r_embeddings, condition, skip=skip)).to(residual)
        prediction: Tensor = self.clf(x)
        return prediction

    def _residual_dtype(self, device: torch.device) -> torch.dtype:
        if self.residual_dtype is not None:
            return self.residual_dtype
        return torch.float32 if torch.is_autocast_enabled(device.type) else self._input_convolution.weight.dtype

    def _run_level(
        self, blocks: nn.Module, x: Tensor, r_embeddings: Tensor, condition: Tensor, *, skip: Tensor | None
    ) -> Tensor:
        for index, block in enumerate(blocks.children()):
            if isinstance(block, ResBlock):
                extra = skip if index == 0 else None
            else:
                extra = r_embeddings if isinstance(block, TimestepBlock) else condition
            x = block(x, extra)
        return x
