"""Print the golden latents of test_effnet.py, computed by torchvision's EfficientNetV2-S.

    python -m venv /tmp/golden && /tmp/golden/bin/pip install torch==2.14.1 torchvision==0.29.1
    /tmp/golden/bin/python tests/training/stage_c/make_effnet_golden.py

Not a test and not imported by one, except for the seeded weights and picture, which both sides must share.
"""

import numpy as np
import torch
from torch import Tensor, nn


def seeded_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Return weights that depend on names and shapes only: numpy's RandomState is frozen across versions."""
    random = np.random.RandomState(0)
    state_dict = {}
    for key, value in sorted(module.state_dict().items()):
        shape = tuple(value.shape)
        if key.endswith("num_batches_tracked"):
            state_dict[key] = torch.zeros_like(value)
            continue
        numbers = random.standard_normal(shape).astype(np.float32)
        if key.endswith("running_var"):
            numbers = 1 + 0.5 * np.abs(numbers)
        elif key.endswith(("running_mean", "bias")):
            numbers = 0.1 * numbers
        elif len(shape) == 1:
            numbers = 1 + 0.1 * numbers
        else:
            numbers = numbers * np.float32(np.sqrt(2 / np.prod(shape[1:])))
        state_dict[key] = torch.from_numpy(np.asarray(numbers, dtype=np.float32))
    return state_dict


def seeded_picture() -> Tensor:
    """Return (1, 3, 64, 96) float32 in [0, 1]."""
    return torch.from_numpy(np.random.RandomState(1).random_sample((1, 3, 64, 96)).astype(np.float32))


class Reference(nn.Module):
    """torchvision's features with the mapper of stage C, run in float64: float32 differs by convolution algorithm."""

    def __init__(self) -> None:
        from torchvision.models import efficientnet_v2_s

        super().__init__()
        self.backbone = efficientnet_v2_s(weights=None).features
        self.mapper = nn.Sequential(nn.Conv2d(1280, 16, 1, bias=False), nn.BatchNorm2d(16, affine=False))

    def forward(self, rgb: Tensor) -> Tensor:
        mean, std = (
            torch.tensor(v, dtype=torch.float64)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )
        return self.mapper(self.backbone((rgb - mean) / std))


if __name__ == "__main__":
    model = Reference()
    model.load_state_dict(seeded_state_dict(model))
    with torch.no_grad():
        latents = model.double().eval()(seeded_picture().double())
    print(tuple(latents.shape), [round(value, 6) for value in latents.flatten().tolist()])
