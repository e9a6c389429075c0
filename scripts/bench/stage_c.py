"""A step of our stage C against a loop written out by hand around diffusers' network: time and memory.

Same sizes, same weights, same latents, noise and text states, AdamW on both sides, fp32. Ours is the recipe's trained
module and the loop's optimizer; the other side is `StableCascadeUNet` and torch alone. Time: in turns, in one process,
so that a noisy machine disturbs both alike. Memory: peak resident memory of two processes of their own, less what they
held before they made their network.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scripts.bench.result import Bar, Result

_SMALL = {"c_cond": 256, "c_hidden": (256, 256), "num_heads": (4, 4), "blocks_down": (1, 3), "blocks_up": (3, 1)}
_LARGE = {"c_cond": 768, "c_hidden": (768, 768), "num_heads": (12, 12), "blocks_down": (2, 6), "blocks_up": (6, 2)}
_IMAGES, _SIDE = 2, 16
_ROUNDS, _FULL_ROUNDS = 5, 7
WAYS = ("ours", "diffusers")


@dataclass(frozen=True)
class _Batch:
    latents: Tensor
    noise: Tensor
    uniform: Tensor
    text: Tensor
    pooled: Tensor


def run(*, full: bool, data: Path | None) -> Result:
    """Measure; `data` is not used."""
    with tempfile.TemporaryDirectory() as folder:
        _write_weights(Path(folder), _LARGE if full else _SMALL)
        peaks = {way: _peak_bytes(way, folder) for way in WAYS}
        seconds, losses = _race(Path(folder), _FULL_ROUNDS if full else _ROUNDS)
    ratios = [ours / theirs for ours, theirs in zip(seconds["ours"], seconds["diffusers"], strict=True)]
    return Result(
        bench="stage_c",
        figures={
            "ours_seconds_per_step": statistics.median(seconds["ours"]),
            "diffusers_seconds_per_step": statistics.median(seconds["diffusers"]),
            "time_ratio": statistics.median(ratios),
            "ours_peak_megabytes": peaks["ours"] / 1e6,
            "diffusers_peak_megabytes": peaks["diffusers"] / 1e6,
            "memory_ratio": peaks["ours"] / peaks["diffusers"],
            "loss_difference": max(abs(ours - theirs) for ours, theirs in zip(*losses.values(), strict=True)),
        },
        bars=[Bar("time_ratio", at_most=1.05), Bar("memory_ratio", at_most=1.05), Bar("loss_difference", at_most=1e-4)],
        full_size=full,
        peer=f"StableCascadeUNet of diffusers {_version()}, torch {torch.__version__}, a loop by hand",
        notes=[
            f"{_IMAGES} images of {_SIDE} × {_SIDE} latents, 77 tokens, no dropout; the median of the rounds' ratios"
        ],
    )


def _version() -> str:
    import diffusers

    return str(diffusers.__version__)


def _write_weights(folder: Path, sizes: dict[str, Any]) -> None:
    """Write the same random weights as our file and as diffusers' folder."""
    from training.stage_c.formats import save_stage_c
    from training.stage_c.network import StageCConfig, StageCNetwork

    torch.manual_seed(0)
    network = StageCNetwork(StageCConfig(**sizes))
    for parameter in network.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)  # as if trained: zeros would hide errors behind them
    save_stage_c(network, folder / "ours.safetensors")
    save_stage_c(network, folder / "diffusers", layout="diffusers")


def _race(folder: Path, rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return seconds and losses by way; the first round warms up."""
    steps = {way: make_step(way, folder) for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    losses: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds + 1):
        for way in sorted(WAYS, reverse=bool(number % 2)):
            started = time.perf_counter()
            losses[way].append(steps[way]())
            if number:
                seconds[way].append(time.perf_counter() - started)
    return seconds, losses


def make_step(way: str, folder: Path) -> Callable[[], float]:
    """Return what trains one step and returns its loss."""
    batch = _batch()
    forward, parameters = _ours(folder) if way == "ours" else _diffusers(folder)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)

    def step() -> float:
        from training.stage_c.gdf import diffuse, p2_weight, timestep_from_uniform

        mixed = diffuse(batch.latents, timestep_from_uniform(batch.uniform), batch.noise)
        predicted = forward(mixed.noised, mixed.r, batch.text, batch.pooled)
        loss = ((predicted - mixed.target).square().mean(dim=(1, 2, 3)) * p2_weight(mixed.logsnr)).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def _batch() -> _Batch:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    uniform = torch.rand(_IMAGES, generator=generator)
    latents, noise = (normal(_IMAGES, 16, _SIDE, _SIDE) for _ in range(2))
    return _Batch(latents, noise, uniform, normal(_IMAGES, 77, 1280), normal(_IMAGES, 1, 1280))


def _ours(folder: Path) -> tuple[Callable[..., Tensor], list[nn.Parameter]]:
    from training.stage_c.formats import load_stage_c
    from training.stage_c.model import StageCModel

    network = load_stage_c(folder / "ours.safetensors")
    network.set_dropout(0.0, attention="none")
    network.clip_img_mapper.weight.requires_grad_(False)
    model = StageCModel(network, None).train()

    def forward(noised: Tensor, r: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        predicted: Tensor = model(noised, r, windows=text, states=(text, pooled), mask=False)
        return predicted

    return forward, [parameter for parameter in model.parameters() if parameter.requires_grad]


def _diffusers(folder: Path) -> tuple[Callable[..., Tensor], list[nn.Parameter]]:
    from diffusers.models.unets.unet_stable_cascade import StableCascadeUNet

    network = StableCascadeUNet.from_pretrained(folder / "diffusers").train()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    network.clip_img_mapper.weight.requires_grad_(False)

    def forward(noised: Tensor, r: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        image = text.new_zeros(text.shape[0], 1, network.config["clip_image_in_channels"])
        predicted: Tensor = network(
            sample=noised, timestep_ratio=r, clip_text_pooled=pooled, clip_text=text, clip_img=image, return_dict=False
        )[0]
        return predicted

    return forward, [parameter for parameter in network.parameters() if parameter.requires_grad]


def _peak_bytes(way: str, folder: str) -> int:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", __name__, way, folder], stdout=subprocess.PIPE, text=True, env=environment, check=True
    )
    peak: int = json.loads(done.stdout.splitlines()[-1])
    return peak


def main() -> None:
    """Train two steps one way, and print the peak in bytes above what the libraries held."""
    from scripts.bench.measured_step import start_peak, status_bytes

    way, folder = sys.argv[1], Path(sys.argv[2])
    toy = folder / f"toy-{way}"
    _write_weights(
        toy, {**_SMALL, "c_hidden": (64, 64), "num_heads": (1, 1), "blocks_down": (1, 1), "blocks_up": (1, 1)}
    )
    make_step(way, toy)()  # libraries and kernels' code are there before the count begins
    before = status_bytes("VmRSS:")
    start_peak()
    step = make_step(way, folder)
    for _ in range(2):
        step()
    print(json.dumps(status_bytes("VmHWM:") - before))


if __name__ == "__main__":
    main()
