"""All of stage C that is trained, as one module with one forward: what DDP, FSDP2 and DeepSpeed need; what fits it."""

from torch import Tensor, nn

from training.config.stage_c import StageCConfig as Settings
from training.stage_c.network import StageCConfig, StageCNetwork
from training.stage_c.text import TextConditioner


class StageCModel(nn.Module):
    """The network, and the text encoder where it is trained with it."""

    def __init__(self, network: StageCNetwork, text: TextConditioner | None) -> None:
        super().__init__()
        self.network = network
        self.text = text

    def forward(
        self,
        noised: Tensor,
        r: Tensor,
        *,
        windows: Tensor,
        states: tuple[Tensor, Tensor] | None,
        mask: bool,
        clip_img: Tensor | None = None,
    ) -> Tensor:
        """Return the predicted noise (B, 16, H, W).

        noised: (B, 16, H, W); r: (B,) noise level; windows: (B, W, 77) token ids, read when the text encoder is
        trained here; states: (clip_text, clip_text_pooled) of a frozen one; clip_img: (B, 768), None means zeros.
        """
        if self.text is not None:
            states = self.text(windows, mask)
        assert states is not None
        predicted: Tensor = self.network(noised, r, *states, clip_img)
        return predicted


def require_widths(
    config: StageCConfig, settings: Settings, *, text: tuple[int, int] | None, image: int | None
) -> None:
    """Raise ValueError unless text model and image model give what a network of this config takes.

    text: channels of states and pooled vector; image: of an embedding. None where there is no such model.
    """
    given = {
        "stage_c.text_encoder gives states": (text and text[0], config.c_clip_text, settings.text_encoder),
        "stage_c.text_encoder gives pooled vectors": (
            text and text[1],
            config.c_clip_text_pooled,
            settings.text_encoder,
        ),
        "stage_c.image_encoder gives embeddings": (image, config.c_clip_img, settings.image_encoder),
    }
    for what, (width, expected, path) in given.items():
        if width is not None and width != expected:
            raise ValueError(
                f"{what} of width {width}, stage_c.network expects {expected}: {path} and {settings.network} do not "
                "belong together"
            )
