"""Token windows in which no tag is cut in two: `strict_tokens`.

d8ahazard's option of this name put literal `</w>` into captions, which CLIP's tokenizer takes for three words of its
own. What its name promises is done here: tags stay whole.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from training.stage_c.text import BOS_ID, EOS_ID, MAX_TOKENS_CHOICES, WINDOW_TOKENS, TokenWindows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize_whole_tags(
    tokenizer: "PreTrainedTokenizerBase", captions: Sequence[str], *, max_tokens: int, pad_id: int
) -> TokenWindows:
    """Cut captions into max_tokens / 75 windows (B, W, 77) at commas only: begin, tags, end, padding.

    A tag that does not fit behind the ones before it opens the next window; one for which there is no window, or
    that is longer than one, is left out, and counted as tokens beyond max_tokens. Raises ValueError for another
    max_tokens.
    """
    if max_tokens not in MAX_TOKENS_CHOICES:
        raise ValueError(f"tokenize_whole_tags: max_tokens must be one of {MAX_TOKENS_CHOICES}, got {max_tokens}")
    num_windows = max_tokens // WINDOW_TOKENS
    windows = torch.full((len(captions), num_windows, WINDOW_TOKENS + 2), pad_id, dtype=torch.int64)
    windows[..., 0], windows[..., 1] = BOS_ID, EOS_ID
    counts = []
    for rows, caption in zip(windows, captions, strict=True):
        parts, num_left_out = _packed(_tags(tokenizer, caption), num_windows)
        for row, ids in zip(rows, parts, strict=False):
            row[1 : len(ids) + 2] = torch.tensor([*ids, EOS_ID])
        counts.append(max_tokens + num_left_out if num_left_out else sum(map(len, parts)))
    return TokenWindows(windows, torch.tensor(counts, dtype=torch.int64))


def _tags(tokenizer: "PreTrainedTokenizerBase", caption: str) -> list[list[int]]:
    """Return the ids of each tag, all but the first with the comma before it."""
    texts = [text for text in (part.strip() for part in caption.split(",")) if text]
    texts = [text if number == 0 else f", {text}" for number, text in enumerate(texts)]
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    return ids


def _packed(tags: Sequence[Sequence[int]], num_windows: int) -> tuple[list[list[int]], int]:
    """Return the windows' ids, and how many ids found no place."""
    windows: list[list[int]] = [[]]
    num_left_out = 0
    for tag in tags:
        if len(windows[-1]) + len(tag) > WINDOW_TOKENS and len(tag) <= WINDOW_TOKENS and len(windows) < num_windows:
            windows.append([])
        if len(windows[-1]) + len(tag) > WINDOW_TOKENS:
            num_left_out += len(tag)
        else:
            windows[-1] += tag
    return windows, num_left_out
