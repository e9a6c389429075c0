"""All of Stable Diffusion that is trained, as one module with one forward: what DDP, FSDP2 and DeepSpeed need."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from training.dreambooth.text import SdText

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


class SdNetworks(nn.Module):
    """The UNet, and the text models where gradients go through them."""

    def __init__(self, unet: "UNet2DConditionModel", text: SdText | None) -> None:
        super().__init__()
        self.unet = unet
        self.text = text

    def forward(
        self,
        noised: Tensor,
        timesteps: Tensor,
        *,
        windows: tuple[Tensor, ...],
        states: tuple[Tensor, Tensor | None] | None,
        time_ids: Tensor | None,
    ) -> Tensor:
        """Return what the UNet predicts, (B, 4, h, w).

        noised: (B, 4, h, w); timesteps: (B,) int64; windows: (B, W, 77) token ids per text model, read when text models
        are trained here; states: (states, pooled) of frozen ones; time_ids: SDXL's six numbers (B, 6), else None.
        """
        if self.text is not None:
            states = self.text(*windows)
        assert states is not None
        hidden, pooled = states
        added: dict[str, Any] | None = None
        if time_ids is not None:
            assert pooled is not None
            added = {"text_embeds": pooled, "time_ids": time_ids}
        predicted: Tensor = self.unet(noised, timesteps, hidden, added_cond_kwargs=added, return_dict=False)[0]
        return predicted
