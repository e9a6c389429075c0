"""Trained tokens over an embedding table: a small parameter of its own, so that nothing else in the table can change.

An embedding is where it started plus a change that begins at 0; weight decay, moments and states see the change only.
The table may be frozen or trained: under a token that is trained here, its row is not used.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.tokens.choose import ChosenTokens

CHANGE, INITIAL, TABLE = "change", "initial", "weight"


class OverlaidEmbedding(nn.Module):
    """Stands in for an nn.Embedding; `weight` is its table, under the same name. Ids past its end are new tokens."""

    def __init__(self, table: nn.Embedding, tokens: ChosenTokens) -> None:
        super().__init__()
        self.weight = table.weight
        device = table.weight.device
        self.change = nn.Parameter(torch.zeros_like(tokens.initial, device=device))
        self.initial: Tensor
        self.place: Tensor
        self.register_buffer(INITIAL, tokens.initial.to(device, copy=True))
        place = torch.full((max(len(table.weight), max(tokens.ids) + 1),), -1)
        place[list(tokens.ids)] = torch.arange(len(tokens.ids))
        self.register_buffer("place", place.to(device), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return embeddings (…, width) of ids."""
        place = self.place[input_ids]
        known = F.embedding(input_ids.clamp_max(len(self.weight) - 1), self.weight)
        rows = F.embedding(place.clamp_min(0), self.initial + self.change)
        return torch.where((place >= 0)[..., None], rows.to(known.dtype), known)


def rows_of(state: Mapping[str, Tensor], prefix: str) -> Tensor:
    """Return the embeddings (N, width) of trained tokens as they are in a state, fp32. prefix: the overlay's name."""
    return state[f"{prefix}.{INITIAL}"].float() + state[f"{prefix}.{CHANGE}"].float()


def without_overlay(state: Mapping[str, Tensor], prefix: str, ids: Sequence[int]) -> dict[str, Tensor]:
    """Return a text model's weights with the trained rows of existing tokens in the table. New tokens are not in it."""
    table = state[f"{prefix}.{TABLE}"].clone()
    for number, row in zip(ids, rows_of(state, prefix), strict=True):
        if number < len(table):
            table[number] = row
    own = {f"{prefix}.{name}" for name in (CHANGE, INITIAL)}
    return {**{name: tensor for name, tensor in state.items() if name not in own}, f"{prefix}.{TABLE}": table}
