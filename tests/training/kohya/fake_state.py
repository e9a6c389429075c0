"""A `-state` folder as kohya's stage C trainer leaves it, at toy size, saved by accelerate.

kohya's network has q, k and v apart: here our own network gets attention modules of that shape, so that the order of
parameters, the keys of model.safetensors and the numbers in optimizer.bin come from torch, not from the code tested.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.optimization import Adafactor

from training.stage_c.blocks import PackedAttention
from training.stage_c.network import StageCNetwork


class SplitAttention(nn.Module):
    """kohya's Attention: linear layers to_q, to_k, to_v, out_proj in this order."""

    def __init__(self, packed: PackedAttention) -> None:
        super().__init__()
        width = packed.out_proj.in_features
        for letter, weight, bias in zip(
            "qkv", packed.in_proj_weight.chunk(3), packed.in_proj_bias.chunk(3), strict=True
        ):
            linear = nn.Linear(width, width)
            linear.load_state_dict({"weight": weight, "bias": bias})
            setattr(self, f"to_{letter}", linear)
        self.out_proj = packed.out_proj


def split_attention(network: StageCNetwork) -> nn.Module:
    """Give the network kohya's attention, in place."""
    for module in list(network.modules()):
        if isinstance(getattr(module, "attn", None), PackedAttention):
            module.attn = SplitAttention(module.attn)
    return network


def make_optimizer(name: str, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
    """The seed's Adafactor, or torch's AdamW."""
    if name == "adafactor":
        return Adafactor(groups, lr=1e-5, scale_parameter=False, relative_step=False, warmup_init=False)
    return torch.optim.AdamW(groups, lr=1e-5)


def fill_gradients(parameters: Iterable[nn.Parameter], *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = (torch.randn(parameter.shape, generator=generator) * 1e-2).to(parameter.dtype)


def save_kohya_state(
    folder: Path,
    network: StageCNetwork,
    text_model: nn.Module | None,
    *,
    optimizer_name: str = "adafactor",
    num_steps: int = 3,
    half: bool = False,
) -> dict[str, Tensor]:
    """Train the modules on made-up gradients as kohya's optimizer would, save all; return the network in kohya's names.

    half: as --full_fp16 leaves weights.
    """
    modules = [split_attention(network), *([text_model] if text_model is not None else [])]
    accelerator = Accelerator(cpu=True)
    optimizer = make_optimizer(optimizer_name, [{"params": list(module.parameters())} for module in modules])
    if half:
        for module in modules:
            module.half()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 100))
    prepared = [accelerator.prepare(module) for module in modules]
    optimizer, scheduler = accelerator.prepare(optimizer, scheduler)
    for step in range(num_steps):
        for number, module in enumerate(prepared):
            fill_gradients(module.parameters(), seed=100 * step + number)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    accelerator.save_state(str(folder))
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
