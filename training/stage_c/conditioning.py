"""Captions of a batch → token windows → CLIP states, and who computes the states: trained, frozen or made ahead."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from sharding.files import digest_of
from training.chunk_data import Batch
from training.config.stage_c import StageCConfig
from training.stage_c.text import TextConditioner, TokenWindows, load_tokenizer, tokenize
from training.stage_c.text_files import load_text_model
from training.tensor_file import digest_of_tensors


class Conditioning:
    """Tokenizer and text model of a run; the model is loaded when it is first asked for.

    dtype: of a trained text model; a frozen one is fp32.

    has_gradients: whether gradients go through it, as they also do when adapters or tokens of it are trained.
    Raises FileNotFoundError or WeightsError naming the file and its keys.
    """

    def __init__(
        self, settings: StageCConfig, *, device: torch.device, dtype: torch.dtype, has_gradients: bool = False
    ) -> None:
        self.has_gradients = settings.train_text_encoder or has_gradients
        self._settings = settings
        self._device = device
        self._dtype = dtype if settings.train_text_encoder else torch.float32
        self.tokenizer = load_tokenizer(settings.tokenizer)

    @cached_property
    def text(self) -> TextConditioner:
        """The text model."""
        settings = self._settings
        text = TextConditioner(load_text_model(settings.text_encoder, self._dtype))
        text.to(self._device).train(self.has_gradients).requires_grad_(settings.train_text_encoder)
        if self.has_gradients and settings.gradient_checkpointing:
            text.enable_checkpointing()
        return text

    @property
    def widths(self) -> tuple[int, int]:
        """Channels of the states and of the pooled vector."""
        config = self.text.text_model.config
        return int(config.hidden_size), int(config.projection_dim)

    def digests(self) -> dict[str, str]:
        """Return a SHA-256 of tokenizer and, where nothing in it is trained, text model, by config key."""
        digests = {"stage_c.tokenizer": digest_of(sorted(self.tokenizer.get_vocab().items()))}
        if not self.has_gradients:
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

    def states_of(self, batch: Batch, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Return (clip_text, clip_text_pooled) of a batch without gradient: those made ahead where there are some."""
        if batch.text is None:
            return self.states(windows)
        clip_text, pooled = (tensor.to(self._device, non_blocking=True).float() for tensor in batch.text)
        return clip_text, pooled

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return (clip_text, clip_text_pooled) of captions, without gradient."""
        return self.states(self.tokens(captions).windows)

    @torch.no_grad()
    def states(self, windows: Tensor, *, attention_mask: bool | None = None) -> tuple[Tensor, Tensor]:
        """Return (clip_text, clip_text_pooled) without gradient, of windows (B, W, 77).

        attention_mask: in place of the run's. On a CPU each caption is encoded alone: there the bits depend on its
        neighbours, and states made ahead have others.
        """
        mask = self._settings.attention_mask if attention_mask is None else attention_mask
        together = 1 if self._device.type == "cpu" else len(windows)
        encoded = [self.text(some, mask) for some in torch.split(windows, together)]
        return torch.cat([text for text, _ in encoded]), torch.cat([pooled for _, pooled in encoded])
