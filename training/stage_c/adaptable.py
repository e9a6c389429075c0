"""The layers that adapters go on: the network's attention with its projections as layers, their names and shapes.

The checkpoint's stacked `in_proj_weight` is a parameter, not a layer: PEFT would put an adapter on it by computing the
whole changed weight in every forward. Here it becomes `in_proj`, one linear layer (one adapter for q, k and v, as in
the official code), or `to_q`, `to_k` and `to_v` (as in kohya's). `layered_to_original` names weights back.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from training.lora.layers import BASE_LAYER, is_adapter
from training.stage_c.blocks import AttnBlock, PackedAttention
from training.stage_c.layouts import to_original
from training.stage_c.network import StageCNetwork


class LayeredAttention(PackedAttention):
    """A packed attention made of layers, on the same numbers. together: q, k and v in one layer."""

    def __init__(self, packed: PackedAttention, *, together: bool, context_has_tokens: bool) -> None:
        nn.Module.__init__(self)  # not the parameters of the packed one
        self.num_heads, self.dropout, self.dropout_on = packed.num_heads, packed.dropout, packed.dropout_on
        self.together, self.context_has_tokens = together, context_has_tokens
        self.out_proj = packed.out_proj
        if together:
            self.in_proj = _linear(packed.in_proj_weight, packed.in_proj_bias)
        else:
            parts = zip(packed.in_proj_weight.chunk(3), packed.in_proj_bias.chunk(3), strict=True)
            self.to_q, self.to_k, self.to_v = (_linear(weight, bias) for weight, bias in parts)

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        """tokens: (B, N, C), context: (B, M, C), beginning with the tokens where they attend to themselves."""
        if not self.together:
            return self.mix(self.to_q(tokens), torch.cat([self.to_k(context), self.to_v(context)], dim=-1))
        # All three of both: what is not needed (q of the captions) is a few percent, and the layer is called once.
        num_tokens, width = tokens.shape[1:]
        rows = context if self.context_has_tokens else torch.cat([tokens, context.to(tokens.dtype)], dim=1)
        projected: Tensor = self.in_proj(rows)
        kv = projected if self.context_has_tokens else projected[:, num_tokens:]
        return self.mix(projected[:, :num_tokens, :width], kv[..., width:])


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight, layer.bias = (nn.Parameter(part.detach().clone(), requires_grad=False) for part in (weight, bias))
    return layer


def make_layered(network: StageCNetwork, *, together: bool) -> None:
    """Replace every attention of the network, in place; at most one block's weights are there twice at a time."""
    for block in network.iter_blocks():
        if isinstance(block, AttnBlock):
            block.attention.attn = LayeredAttention(
                block.attention.attn, together=together, context_has_tokens=block.self_attn
            )


def layered_to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a layered network's weights (without adapters) in the original layout."""
    renamed = {name.replace(".attn.in_proj.", ".attn.in_proj_"): tensor for name, tensor in state.items()}
    return to_original(renamed)


def layer_shapes(network: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of a layered network's weights by layer, q, k and v both together and apart."""
    shapes = {}
    for name, parameter in network.named_parameters():
        if not name.endswith(".weight") or is_adapter(name):
            continue
        layer, shape = name.replace(BASE_LAYER, "").removesuffix(".weight"), parameter.shape
        shapes[layer] = shape
        block = layer.rpartition(".")[0]
        if layer.endswith(".attn.in_proj"):
            shapes |= {f"{block}.to_{letter}": torch.Size((shape[0] // 3, shape[1])) for letter in "qkv"}
        elif layer.endswith(".attn.to_q"):
            shapes[f"{block}.in_proj"] = torch.Size((shape[0] * 3, shape[1]))
    return shapes
