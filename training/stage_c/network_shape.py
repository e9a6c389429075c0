"""The shape of a stage C network: widths, heads, blocks; and reading it off the weights' own shapes. No layers here."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StageCConfig:
    """Shape of a stage C network; the defaults are the published 3.6 B model.

    Levels are counted from the outside in: c_hidden, num_heads, blocks_down and dropout have one entry per level;
    blocks_up is in the order of `up_blocks`, innermost level first. switch_level has one entry per pair of
    neighbouring levels: whether the inner one works at half the size.

    Raises ValueError when the entries do not fit together.
    """

    c_in: int = 16
    c_out: int = 16
    c_r: int = 64
    patch_size: int = 1
    c_cond: int = 2048
    c_hidden: tuple[int, ...] = (2048, 2048)
    num_heads: tuple[int, ...] = (32, 32)
    blocks_down: tuple[int, ...] = (8, 24)
    blocks_up: tuple[int, ...] = (24, 8)
    c_clip_text: int = 1280
    c_clip_text_pooled: int = 1280
    c_clip_img: int = 768
    c_clip_seq: int = 4
    dropout: tuple[float, ...] = (0.1, 0.1)
    self_attn: bool = True
    switch_level: tuple[bool, ...] = (False,)

    def __post_init__(self) -> None:
        levels = len(self.c_hidden)
        for name in ("num_heads", "blocks_down", "blocks_up", "dropout"):
            if len(getattr(self, name)) != levels:
                raise ValueError(
                    f"stage C config: {name} has {len(getattr(self, name))} entries but c_hidden has {levels}; "
                    "give one per level"
                )
        if len(self.switch_level) != levels - 1:
            raise ValueError(
                f"stage C config: switch_level has {len(self.switch_level)} entries; {levels} levels need {levels - 1}"
            )
        for width, heads in zip(self.c_hidden, self.num_heads, strict=True):
            if heads < 1 or width % heads:
                raise ValueError(f"stage C config: c_hidden {width} is not divisible by num_heads {heads}")
        if self.c_r < 4 or self.c_r % 2:
            raise ValueError(f"stage C config: c_r must be even and at least 4, got {self.c_r}")

    @classmethod
    def large(cls) -> "StageCConfig":
        """Return the config of the 3.6 B model (3,589,103,632 parameters)."""
        return cls()

    @classmethod
    def lite(cls) -> "StageCConfig":
        """Return the config of the 1 B model (1,030,785,040 parameters)."""
        return cls(c_cond=1536, c_hidden=(1536, 1536), num_heads=(24, 24), blocks_down=(4, 12), blocks_up=(12, 4))


def config_from_state_dict(
    state_dict: Mapping[str, Tensor], *, num_heads: tuple[int, ...] | None = None
) -> StageCConfig:
    """Infer the config from the shapes of a state dict in the original layout.

    Shapes do not tell the number of heads: without num_heads it is width / 64, as in every published model. Nor do
    they tell dropout, self_attn and switch_level; those get the published values. Latents are taken to have
    16 channels unless the patch size that follows is not whole.

    Raises ValueError if a key that carries a shape is missing, or num_heads is None and a width is
    not a multiple of 64.
    """

    def shape(key: str) -> torch.Size:
        if key not in state_dict:
            raise ValueError(f"stage C weights: key {key!r} is missing, so the network's shape is unknown")
        return state_dict[key].shape

    blocks_down, blocks_up = (_count_blocks(state_dict, name) for name in ("down_blocks", "up_blocks"))
    c_hidden = tuple(shape(f"down_blocks.{level}.0.depthwise.weight")[0] for level in range(len(blocks_down)))
    if num_heads is None:
        for width in c_hidden:
            if width % 64:
                raise ValueError(
                    f"stage C weights: width {width} is not a multiple of 64, so the number of heads is unknown; "
                    "pass num_heads, or use a file whose metadata holds the config"
                )
        num_heads = tuple(width // 64 for width in c_hidden)
    c_cond, c_clip_text = shape("clip_txt_mapper.weight")
    pooled_out, c_clip_text_pooled = shape("clip_txt_pooled_mapper.weight")
    packed_in, packed_out = shape("embedding.1.weight")[1], shape("clf.1.weight")[0]
    patch_size = math.isqrt(packed_in // 16) if packed_in % 16 == 0 else 1
    if patch_size**2 * 16 != packed_in:
        patch_size = 1
    levels = len(c_hidden)
    return StageCConfig(
        c_in=packed_in // patch_size**2,
        c_out=packed_out // patch_size**2,
        c_r=shape("down_blocks.0.1.mapper.weight")[1],
        patch_size=patch_size,
        c_cond=c_cond,
        c_hidden=c_hidden,
        num_heads=num_heads,
        blocks_down=blocks_down,
        blocks_up=blocks_up,
        c_clip_text=c_clip_text,
        c_clip_text_pooled=c_clip_text_pooled,
        c_clip_img=shape("clip_img_mapper.weight")[1],
        c_clip_seq=pooled_out // c_cond,
        dropout=(0.1,) * levels,
        switch_level=(False,) * (levels - 1),
    )


def _count_blocks(state_dict: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    counts: dict[int, int] = {}
    for key in state_dict:
        parts = key.split(".")
        if parts[0] == name and key.endswith("depthwise.weight"):
            counts[int(parts[1])] = counts.get(int(parts[1]), 0) + 1
    if not counts or set(counts) != set(range(len(counts))):
        raise ValueError(f"stage C weights: no complete {name!r} found (levels {sorted(counts)})")
    return tuple(counts[level] for level in range(len(counts)))
