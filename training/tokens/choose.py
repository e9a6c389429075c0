"""Which tokens are trained, where they start, and the tokenizer that knows the new ones.

Rules of the official StableCascade LoRA code's `train_tokens`: a bracketed word is a new token that starts as the mean
of the embeddings that a regular expression finds in the vocabulary, or at 0; another expression names existing tokens.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from training.config.lora import TrainedTokenConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ChosenTokens:
    """Tokens in the order of their ids. initial: (N, width) fp32, the embeddings that they start from."""

    names: tuple[str, ...]
    ids: tuple[int, ...]
    initial: Tensor
    num_new: int

    def __str__(self) -> str:
        listing = ", ".join(f"{name} ({number})" for name, number in zip(self.names[:8], self.ids, strict=False))
        return f"tokens that are trained: {len(self.names):,}, new: {self.num_new:,}: {listing}" + (
            " …" if len(self.names) > 8 else ""
        )


def choose_tokens(
    tokenizer: "PreTrainedTokenizerBase", table: Tensor, train: Sequence[TrainedTokenConfig]
) -> ChosenTokens:
    """Add new tokens to the tokenizer, and return all that are trained. table: (vocabulary, width) embeddings.

    Raises ValueError for an expression that finds nothing, and for a new token that the tokenizer has or cuts up.
    """
    vocabulary = _vocabulary(tokenizer, table)
    rows: dict[int, tuple[str, Tensor]] = {}
    num_new = 0
    for number, one in enumerate(train):
        key = f"tokens.train.{number}"
        if one.existing is not None:
            for name in _found(vocabulary, one.existing, f"{key}.existing"):
                rows[vocabulary[name]] = (name, table[vocabulary[name]].float())
            continue
        assert one.token is not None
        if one.token in tokenizer.get_vocab():
            raise ValueError(f"{key}.token: {one.token!r} is in the tokenizer; train it with existing")
        start = _start(one, vocabulary, table, key)
        rows[_added(tokenizer, one.token, key)] = (one.token, start)
        num_new += 1
    ids = tuple(sorted(rows))
    initial = torch.stack([rows[number][1] for number in ids])
    return ChosenTokens(tuple(rows[number][0] for number in ids), ids, initial, num_new)


def in_another_table(
    tokens: ChosenTokens, tokenizer: "PreTrainedTokenizerBase", table: Tensor, train: Sequence[TrainedTokenConfig]
) -> ChosenTokens:
    """Return the same tokens as they start in a second text model's table; tokenizer and train: as they were chosen."""
    vocabulary = _vocabulary(tokenizer, table)
    new = {one.token: (one, f"tokens.train.{number}") for number, one in enumerate(train) if one.token is not None}
    rows = [
        _start(new[name][0], vocabulary, table, new[name][1]) if name in new else table[number].float()
        for name, number in zip(tokens.names, tokens.ids, strict=True)
    ]
    return replace(tokens, initial=torch.stack(rows))


def _vocabulary(tokenizer: "PreTrainedTokenizerBase", table: Tensor) -> dict[str, int]:
    """Return the tokens that the table has a row for."""
    return {name: number for name, number in tokenizer.get_vocab().items() if number < len(table)}


def _start(one: TrainedTokenConfig, vocabulary: dict[str, int], table: Tensor, key: str) -> Tensor:
    if one.initialise is None:
        return torch.zeros(table.shape[1], device=table.device)
    found = [vocabulary[name] for name in _found(vocabulary, one.initialise, f"{key}.initialise")]
    return table[found].float().mean(dim=0)


def _found(vocabulary: dict[str, int], pattern: str, key: str) -> list[str]:
    found = sorted(name for name in vocabulary if re.search(pattern, name))
    if not found:
        raise ValueError(
            f"{key}: {pattern!r} finds none of {len(vocabulary):,} tokens; words end with </w>, as in '^dog</w>'"
        )
    return found


def _added(tokenizer: "PreTrainedTokenizerBase", token: str, key: str) -> int:
    tokenizer.add_tokens([token])
    ids = tokenizer(f"a {token}, b", add_special_tokens=False)["input_ids"]
    number = int(tokenizer.convert_tokens_to_ids(token))
    if number not in ids:
        raise ValueError(f"{key}.token: the tokenizer cuts {token!r} up ({ids}); choose a plainer word in brackets")
    return number
