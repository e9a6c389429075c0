"""All of stage C that is trained, as one module with one forward: what DDP, FSDP2 and DeepSpeed need."""

from torch import Tensor, nn

from training.stage_c.network import StageCNetwork
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
