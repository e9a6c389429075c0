"""Text conditioning of stage C: tokens in windows of 75, CLIP states before the final norm, pooled vector.

Captions longer than 75 tokens are encoded as two or three windows of 77 (begin, 75 tokens, end) and put back together
as one sequence of 152 or 227 states. The pooled vector only sees the first window. Transformers 4.57 and 5 both work.
Making the caption text is not done here; files of the text model are read and written in `text_files`.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from training.stage_c.clip_vocabulary import write_tokenizer_files
from training.stage_c.hub import load_component

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerBase

BOS_ID, EOS_ID = 49_406, 49_407
WINDOW_TOKENS = 75
MAX_TOKENS_CHOICES = (75, 150, 225)


class TokenWindows(NamedTuple):
    """windows: (B, num_windows, 77) int64. num_tokens: (B,) int64, tokens of the whole caption before any cut.

    A caption was cut where num_tokens > max_tokens, and its pooled vector misses text where num_tokens > 75.
    """

    windows: Tensor
    num_tokens: Tensor


def load_tokenizer(path_or_id: str | Path) -> "PreTrainedTokenizerBase":
    """Return a CLIP tokenizer from a folder, a hub id, or "builtin" (the vocabulary shipped with this package).

    The folder or hub id may be a whole pipeline's, with a `tokenizer/`, or a tokenizer's own; `owner/name/sub` names
    another subfolder.
    Raises ValueError if its begin and end tokens are not CLIP's 49406 and 49407; FileNotFoundError if nothing is there.
    """
    from transformers import AutoTokenizer

    if str(path_or_id) == "builtin":
        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer_files(Path(folder))
            tokenizer = AutoTokenizer.from_pretrained(folder)
    else:
        try:
            tokenizer = load_component(
                AutoTokenizer.from_pretrained, path_or_id, "tokenizer", file_name="tokenizer_config.json"
            )
        except FileNotFoundError:
            raise
        except OSError as error:
            raise FileNotFoundError(
                f"tokenizer {str(path_or_id)!r}: could not be loaded ({error}); "
                'give a folder with tokenizer_config.json, vocab.json and merges.txt, or "builtin"'
            ) from error
    if (tokenizer.bos_token_id, tokenizer.eos_token_id) != (BOS_ID, EOS_ID):
        raise ValueError(
            f"tokenizer {str(path_or_id)!r}: begin and end ids are {tokenizer.bos_token_id} and "
            f"{tokenizer.eos_token_id}, CLIP's are {BOS_ID} and {EOS_ID}; choose a CLIP tokenizer"
        )
    return tokenizer


def tokenize(tokenizer: "PreTrainedTokenizerBase", captions: Sequence[str], *, max_tokens: int) -> TokenWindows:
    """Cut captions into max_tokens / 75 windows of 77 ids: begin, 75 ids, last id.

    The caption is begin + its first max_tokens ids + end, filled with the end id (49407 is also the pad id); each
    window takes 75 ids of it and repeats the begin and the last id.

    Raises ValueError if max_tokens is not 75, 150 or 225.
    """
    if max_tokens not in MAX_TOKENS_CHOICES:
        raise ValueError(f"tokenize: max_tokens must be one of {MAX_TOKENS_CHOICES}, got {max_tokens}")
    if not captions:
        return TokenWindows(
            torch.empty(0, max_tokens // WINDOW_TOKENS, WINDOW_TOKENS + 2, dtype=torch.int64),
            torch.empty(0, dtype=torch.int64),
        )
    rows = tokenizer(list(captions), add_special_tokens=False, truncation=False, padding=False, verbose=False)
    ids = torch.full((len(captions), max_tokens), EOS_ID, dtype=torch.int64)
    for index, row in enumerate(rows["input_ids"]):
        kept = row[:max_tokens]
        ids[index, : len(kept)] = torch.tensor(kept, dtype=torch.int64)
    windows = ids.reshape(len(captions), -1, WINDOW_TOKENS)
    # After begin + max_tokens ids the last id is always the end token, whether the caption was cut or filled.
    begin, end = (torch.full_like(windows[..., :1], special) for special in (BOS_ID, EOS_ID))
    num_tokens = torch.tensor([len(row) for row in rows["input_ids"]], dtype=torch.int64)
    return TokenWindows(torch.cat([begin, windows, end], dim=-1), num_tokens)


def real_token_mask(token_windows: Tensor) -> Tensor:
    """Return 1 up to and including the first end token of each window, 0 for the padding after it; same shape."""
    is_end = (token_windows == EOS_ID).long()
    return ((is_end.cumsum(-1) - is_end) == 0).long()


def join_windows(states: Tensor) -> Tensor:
    """Join window states (B, W, 77, C) to (B, 75 W + 2, C): first begin, all 75s in order, last end."""
    inner = states[:, :, 1 : WINDOW_TOKENS + 1].flatten(1, 2)
    return torch.cat([states[:, 0, :1], inner, states[:, -1, -1:]], dim=1)


def encode(
    text_model: "CLIPTextModelWithProjection", token_windows: Tensor, *, use_attention_mask: bool
) -> tuple[Tensor, Tensor]:
    """Return clip_text (B, 75 W + 2, hidden) and clip_text_pooled (B, 1, projection) of windows (B, W, 77).

    clip_text is the last layer's output before the final norm, the `hidden_states[-1]` of CLIP in transformers: read
    as the input of that norm, because a range of transformers releases put the normed states there. The pooled vector
    is the projection of the normed state at the first end token of the first window.
    use_attention_mask: hide padding inside the text model, as diffusers does; kohya's trainer does not.
    Wrap the model in TextConditioner for training: hooks of DDP and FSDP only see a module's forward.

    Raises ValueError if token_windows is not (B, W, 77).
    """
    if token_windows.ndim != 3 or token_windows.shape[2] != WINDOW_TOKENS + 2:
        raise ValueError(f"encode: token windows must be (B, W, {WINDOW_TOKENS + 2}), got {tuple(token_windows.shape)}")
    batch, num_windows, _ = token_windows.shape
    ids = token_windows.flatten(0, 1)
    before_norm: list[Tensor] = []
    norm = text_model.text_model.final_layer_norm
    handle = norm.register_forward_pre_hook(lambda _module, inputs: before_norm.append(inputs[0]))
    try:
        output = text_model(input_ids=ids, attention_mask=real_token_mask(ids) if use_attention_mask else None)
    finally:
        handle.remove()
    states, pooled = before_norm[0], output.text_embeds
    states = states.reshape(batch, num_windows, *states.shape[1:])
    return join_windows(states), pooled.reshape(batch, num_windows, -1)[:, :1]


class TextConditioner(nn.Module):
    """The text model as one module whose forward does everything, so that DDP, FSDP and DeepSpeed see it all.

    Raises ValueError if the model's config would pool at another token than the first end token.
    """

    def __init__(self, text_model: "CLIPTextModelWithProjection") -> None:
        super().__init__()
        config = text_model.config
        # transformers reads 2 as "the highest id", which is the end token of CLIP's vocabulary.
        if config.eos_token_id != EOS_ID and not (config.eos_token_id == 2 and config.vocab_size == EOS_ID + 1):
            raise ValueError(
                f"text model: eos_token_id {config.eos_token_id} (vocabulary {config.vocab_size}) does not pool at "
                f"the end token; set it to {EOS_ID} in the model's config.json"
            )
        self.text_model = text_model

    def enable_checkpointing(self) -> None:
        """Compute activations again in the backward pass. The method's old name goes with transformers 6."""
        model: Any = self.text_model
        has_new_name = hasattr(model, "activation_checkpointing_enable")
        enable = model.activation_checkpointing_enable if has_new_name else model.gradient_checkpointing_enable
        enable({"use_reentrant": False})

    def forward(self, token_windows: Tensor, use_attention_mask: bool = False) -> tuple[Tensor, Tensor]:
        """Return (clip_text, clip_text_pooled) of token windows (B, W, 77); see encode."""
        return encode(self.text_model, token_windows, use_attention_mask=use_attention_mask)
