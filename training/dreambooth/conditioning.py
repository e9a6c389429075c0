"""Captions of a batch → token windows → text states, and SDXL's six numbers about a picture's size and crop."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sharding.files import digest_of
from training.chunk_data import Batch
from training.config.dreambooth import DreamBoothConfig
from training.dreambooth.strict_tokens import tokenize_whole_tags
from training.dreambooth.text import SdText, pad_ids, tokenize
from training.tensor_file import digest_of_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Conditioning:
    """Tokenizer and text models of a run. has_gradients: gradients go through the text models, or will in a stage."""

    def __init__(
        self,
        settings: DreamBoothConfig,
        text: SdText,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        device: torch.device,
        has_gradients: bool = False,
    ) -> None:
        self.text, self.tokenizer, self.has_gradients = text, tokenizer, has_gradients
        self._settings, self._device = settings, device

    def digests(self) -> dict[str, str]:
        """Return a SHA-256 of tokenizer and, where nothing in them is trained, text models, by config key."""
        digests = {"dreambooth.tokenizer": digest_of(sorted(self.tokenizer.get_vocab().items()))}
        if not self.has_gradients:
            digests["dreambooth.text_encoders"] = digest_of_tensors(self.text.state_dict())
        return digests

    def tokens(self, captions: Sequence[str]) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return windows (B, W, 77) for each text model on the device, and (B,) how many tokens were cut."""
        make = tokenize_whole_tags if self._settings.strict_tokens else tokenize
        max_tokens = self._settings.max_tokens
        made = [
            make(self.tokenizer, captions, max_tokens=max_tokens, pad_id=pad_id) for pad_id in pad_ids(self.text.family)
        ]
        cut = (made[0].num_tokens - max_tokens).clamp_min(0)
        return tuple(one.windows.to(self._device) for one in made), cut

    def states_of(self, batch: Batch, windows: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        """Return (states, pooled) of a batch without gradient: those made ahead where there are some."""
        if batch.text is None:
            return self.states(windows)
        states, *pooled = (tensor.to(self._device, non_blocking=True).float() for tensor in batch.text)
        return states, pooled[0] if pooled else None

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, ...]:
        """Return states and, of SDXL, pooled vectors of captions, without gradient."""
        states, pooled = self.states(self.tokens(captions)[0])
        return (states,) if pooled is None else (states, pooled)

    @torch.no_grad()
    def states(self, windows: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        """Return (states, pooled) without gradient. On a CPU each caption is encoded alone: there the bits depend on
        its neighbours, and what is made ahead has others.
        """
        size = len(windows[0])
        together = 1 if self._device.type == "cpu" else size
        made = [self.text(*(one[start : start + together] for one in windows)) for start in range(0, size, together)]
        pooled = [vector for _, vector in made if vector is not None]
        return torch.cat([states for states, _ in made]), torch.cat(pooled) if pooled else None


def time_ids(batch: Batch, *, pixels_per_latent: int, device: torch.device) -> Tensor:
    """Return SDXL's (B, 6): original height and width, top and left of the crop, height and width that is trained.

    The crop is where the bucket's rectangle was cut out of the resized picture, as Podell et al. 2023
    (arXiv:2307.01952, section 2.2) have it; each sample has its own.
    """
    if batch.images is not None:
        height, width = batch.images.shape[2:]
    else:
        assert batch.latents is not None
        height, width = (side * pixels_per_latent for side in batch.latents.shape[2:])
    rows = [
        [original[1], original[0], crop[1], crop[0], height, width]
        for original, crop in zip(batch.original_sizes, batch.crops, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float32, device=device)
