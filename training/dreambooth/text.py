"""Text conditioning of Stable Diffusion: windows of 75 tokens, clip skip, one text model or SDXL's two.

Clip skip counts as A1111 and kohya count it: 1 is the last layer, 2 the one before; diffusers' number is one less.
Captions are cut and put back together as in kohya's trainer: 77, 152 or 227 states.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from training.dreambooth.single_file.layout import Family
from training.stage_c.text import BOS_ID, EOS_ID, MAX_TOKENS_CHOICES, WINDOW_TOKENS, TokenWindows, join_windows

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerBase

_OPENCLIP_PAD = 0
"""The token `!`, with which SD 2 and SDXL's second text model fill up; CLIP-L fills up with its end token."""
SDXL_CLIP_SKIP = 2


def pad_ids(family: Family) -> tuple[int, ...]:
    """Return what each text model of a family is filled up with."""
    return {"sd1": (EOS_ID,), "sd2": (_OPENCLIP_PAD,), "sdxl": (EOS_ID, _OPENCLIP_PAD)}[family]


def tokenize(
    tokenizer: "PreTrainedTokenizerBase", captions: Sequence[str], *, max_tokens: int, pad_id: int
) -> TokenWindows:
    """Cut captions into max_tokens / 75 windows (B, W, 77) of ids: begin, 75 ids, a last one.

    Where padding is not the end token, a window that is full ends with the end token, one that goes on with padding has
    padding there, and one that holds nothing begins with an end token. Raises ValueError for another max_tokens.
    """
    if max_tokens not in MAX_TOKENS_CHOICES:
        raise ValueError(f"tokenize: max_tokens must be one of {MAX_TOKENS_CHOICES}, got {max_tokens}")
    rows = tokenizer(list(captions), add_special_tokens=False, truncation=False, padding=False, verbose=False)
    whole = torch.full((len(captions), max_tokens + 1), pad_id, dtype=torch.int64)
    for row, ids in zip(whole, rows["input_ids"], strict=True):
        kept = ids[:max_tokens]
        row[: len(kept) + 1] = torch.tensor([*kept, EOS_ID])
    last = whole[:, -1:].unsqueeze(1).expand(-1, max_tokens // WINDOW_TOKENS, -1).clone()
    inner = whole[:, :max_tokens].reshape(len(captions), -1, WINDOW_TOKENS).clone()
    is_full = (inner[..., -1:] != EOS_ID) & (inner[..., -1:] != pad_id)
    last[is_full] = EOS_ID
    inner[..., :1][inner[..., :1] == pad_id] = EOS_ID
    windows = torch.cat([torch.full_like(last, BOS_ID), inner, last], dim=-1)
    return TokenWindows(windows, torch.tensor([len(ids) for ids in rows["input_ids"]], dtype=torch.int64))


class SdText(nn.Module):
    """The text models of a family as one module, so that DDP, FSDP and DeepSpeed see all of them in one forward.

    clip_skip: 1 is the last layer; of SDXL always the one before the last. Layers behind the one that is read get no
    gradient, so they are frozen. Raises ValueError when there is no such layer.
    """

    def __init__(
        self,
        family: Family,
        texts: "Sequence[CLIPTextModel | CLIPTextModelWithProjection]",
        *,
        clip_skip: int = 1,
    ) -> None:
        super().__init__()
        self.family = family
        self.clip_skip = SDXL_CLIP_SKIP if family == "sdxl" else clip_skip
        self.texts = nn.ModuleList(texts)
        for text in texts:
            layers = _inner(text).encoder.layers
            if not 1 <= self.clip_skip <= len(layers):
                raise ValueError(f"dreambooth.clip_skip {self.clip_skip}: the text model has {len(layers)} layers")
            self._freeze_unread(text)

    def unfreeze(self, text: nn.Module) -> None:
        """Let gradients reach all of one text model that is read."""
        text.requires_grad_(True)
        self._freeze_unread(text)

    def _freeze_unread(self, text: nn.Module) -> None:
        if hasattr(text, "text_projection"):
            return
        layers = _inner(text).encoder.layers
        for layer in layers[len(layers) - self.clip_skip + 1 :]:
            layer.requires_grad_(False)
        if self.family == "sdxl":
            _inner(text).final_layer_norm.requires_grad_(False)

    def forward(self, *windows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the states (B, 75 W + 2, C) for cross attention and, of SDXL, the pooled vector (B, P).

        windows: (B, W, 77) per text model; see `tokenize`.
        """
        states, pooled = [], None
        for text, ids in zip(self.texts, windows, strict=True):
            own, projected = self._encode(text, ids)
            states.append(own)
            pooled = projected if projected is not None else pooled
        return torch.cat(states, dim=-1), pooled

    def _encode(self, text: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        batch, num_windows, _ = ids.shape
        inner = _inner(text)
        read: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            read.append(output if isinstance(output, Tensor) else output[0])

        handle = inner.encoder.layers[-self.clip_skip].register_forward_hook(keep)
        try:
            output = text(input_ids=ids.flatten(0, 1))
        finally:
            handle.remove()
        states = read[0] if self.family == "sdxl" else inner.final_layer_norm(read[0])
        states = join_windows(states.reshape(batch, num_windows, *states.shape[1:]))
        projected = getattr(output, "text_embeds", None)
        return states, None if projected is None else projected.reshape(batch, num_windows, -1)[:, 0]


def _inner(text: nn.Module) -> Any:
    """Return where the layers are: transformers 5.6 and later have no `text_model` in a CLIPTextModel."""
    return getattr(text, "text_model", text)
