"""Captions of a batch → token windows → CLIP states, and who computes the states: trained, frozen or made ahead."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sharding.files import digest_of
from training.config.stage_c import StageCConfig
from training.stage_c.text import TextConditioner, TokenWindows, load_tokenizer, tokenize
from training.stage_c.text_files import load_text_model
from training.tensor_file import digest_of_tensors


class Conditioning:
    """Tokenizer and text model of a run. dtype: of a trained text model; a frozen one is fp32.

    Raises FileNotFoundError or WeightsError naming the file and its keys.
    """

    def __init__(self, settings: StageCConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        is_trained = settings.train_text_encoder
        self._settings = settings
        self._device = device
        self.tokenizer = load_tokenizer(settings.tokenizer)
        self.text = TextConditioner(load_text_model(settings.text_encoder, dtype if is_trained else torch.float32))
        self.text.to(device).train(is_trained).requires_grad_(is_trained)
        if is_trained and settings.gradient_checkpointing:
            self.text.text_model.gradient_checkpointing_enable({"use_reentrant": False})

    @property
    def text_width(self) -> int:
        """Channels of the states."""
        return int(self.text.text_model.config.hidden_size)

    def digests(self) -> dict[str, str]:
        """Return a SHA-256 of tokenizer and, where it is frozen, text model, by config key."""
        digests = {"stage_c.tokenizer": digest_of(sorted(self.tokenizer.get_vocab().items()))}
        if not self._settings.train_text_encoder:
            digests["stage_c.text_encoder"] = digest_of_tensors(self.text.state_dict())
        return digests

    def tokens(self, captions: Sequence[str], *, max_tokens: int | None = None) -> TokenWindows:
        """Return the captions' token windows (B, W, 77) on the device, and their counts on the CPU.

        max_tokens: in place of the run's.
        """
        tokens = tokenize(self.tokenizer, captions, max_tokens=max_tokens or self._settings.max_tokens)
        return TokenWindows(tokens.windows.to(self._device), tokens.num_tokens)

    def num_cut(self, tokens: TokenWindows) -> Tensor:
        """Return (B,) how many tokens of each caption did not fit."""
        return (tokens.num_tokens - self._settings.max_tokens).clamp_min(0)

    @torch.no_grad()
    def states(self, windows: Tensor, *, attention_mask: bool | None = None) -> tuple[Tensor, Tensor]:
        """Return (clip_text, clip_text_pooled) without gradient, of windows (B, W, 77).

        attention_mask: in place of the run's.
        """
        mask = self._settings.attention_mask if attention_mask is None else attention_mask
        clip_text, pooled = self.text(windows, mask)
        return clip_text, pooled
