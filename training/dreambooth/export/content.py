"""What is exported: a loaded model, and the tensors of its parts that were trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from training.dreambooth.sd_models.models import TEXT_NAMES, SdModel
from training.dreambooth.single_file.layout import Parts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SdWeights:
    """Tensors go by the names of diffusers' and transformers' modules. None: the part was not trained.

    A part that was not trained is written from the source file where there is one, else from the model's module.
    """

    model: SdModel
    tokenizer: "PreTrainedTokenizerBase"
    unet: Mapping[str, Tensor] | None = None
    texts: tuple[Mapping[str, Tensor] | None, ...] = ()
    """By text model; may be shorter than the family has."""
    average: Mapping[str, Tensor] | None = None
    """The UNet's running average, to be written beside it."""

    def text(self, place: int) -> Mapping[str, Tensor] | None:
        """Return the trained tensors of a text model, or None."""
        return self.texts[place] if place < len(self.texts) else None

    @property
    def source(self) -> Path | None:
        """The single file that exports are laid over."""
        return self.model.source

    @property
    def whole(self) -> Parts:
        """All parts, whatever was trained."""
        model = self.model
        texts = [self.text(place) for place in range(len(model.texts))]
        return Parts(
            unet=model.unet.state_dict() if self.unet is None else self.unet,
            vae=model.vae.state_dict(),
            texts=tuple(
                module.state_dict() if own is None else own for module, own in zip(model.texts, texts, strict=True)
            ),
            average=self.average,
        )

    @property
    def parts(self) -> Parts:
        """Those that are not as they stand in the source file; all of them when there is none."""
        if self.source is None:
            return self.whole
        return Parts(
            unet=self.whole.unet if self.unet is not None or self.model.is_average else None,
            vae=None if self.model.has_own_vae else self.whole.vae,
            texts=tuple(self.text(place) for place in range(len(self.model.texts))),
            average=self.average,
        )

    @property
    def kept(self) -> frozenset[str]:
        """Names of the parts that are taken from the source file: `unet`, `vae`, `text_encoder`, `text_encoder_2`."""
        parts = self.parts
        named = {"unet": parts.unet, "vae": parts.vae, **dict(zip(TEXT_NAMES, parts.texts, strict=False))}
        return frozenset(name for name, tensors in named.items() if tensors is None)
