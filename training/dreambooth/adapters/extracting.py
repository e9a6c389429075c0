"""Make a LoRA of what differs between two Stable Diffusion models of one family, layer by layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from training.dreambooth.adapters.files import write_kohya_file
from training.dreambooth.adapters.merging import SIDES, modules_of
from training.dreambooth.adapters.names import TEXT, UNET, base_version, expanded
from training.dreambooth.export.header import sd_modelspec
from training.dreambooth.sd_models.models import load_sd
from training.dreambooth.sd_models.prediction import PredictionType
from training.lora.adapter import Adapter, AdapterError
from training.lora.layers import adaptable, chosen
from training.lora.svd import Reduced, reduced_change
from training.weight_files import WeightsReport


@dataclass(frozen=True)
class Extracted:
    """What was written. layers: {component: {layer: its LoRA}}; outside: of all squared changes, the share in weights
    that it cannot hold (norms, biases, embeddings, layers that are not targeted)."""

    report: WeightsReport
    layers: Mapping[str, Mapping[str, Reduced]]
    outside: float


def extract_sd(
    base: str,
    tuned: str,
    output: Path,
    *,
    rank: int | None,
    conv_rank: int | None = None,
    share: float = 1.0,
    dtype: torch.dtype = torch.float16,
    prediction: PredictionType | None = None,
) -> Extracted:
    """Write kohya's file of LoRAs that come nearest to `tuned` on `base`; see `training.lora.svd`.

    conv_rank: of 3×3 convolutions, with which those of ResNets and samplers are taken, too; None leaves them out.
    prediction: of SD 2 files that do not say it. Both models are in memory in fp32. Raises AdapterError when they do
    not differ, or are of other families or sizes.
    """
    first, second = (load_sd(one, prediction=prediction) for one in (base, tuned))
    if first.family != second.family:
        raise AdapterError(f"{base} is {first.family}, {tuned} is {second.family}: nothing can be said in layers")
    found: dict[str, dict[str, Reduced]] = {}
    total = held = 0.0
    for part, module in modules_of(first).items():
        changes = _changes(module, modules_of(second)[part], names=(base, tuned))
        total += sum(float(change.double().square().sum()) for change in changes.values())
        for layer, own_rank in _layers(module, part, rank, conv_rank).items():
            change = changes.get(f"{layer}.weight")
            if change is not None:
                result = reduced_change(change, rank=own_rank, share=share)
                found.setdefault(part, {})[layer] = result
                held += result.whole_norm**2
    if not found:
        raise AdapterError(f"{tuned} does not differ from {base} in any layer that a LoRA has")
    adapters = {part: {layer: one.adapter for layer, one in own.items()} for part, own in found.items()}
    version = base_version(first.family, predicts_v=second.prediction.kind == "v_prediction")
    side = SIDES[first.family]
    header = sd_modelspec(second, title=output.stem, width=side, height=side)
    header["modelspec.architecture"] += "/lora"
    report = write_kohya_file(
        output, adapters, family=first.family, unet_layers=adaptable(first.unet), dtype=dtype,
        metadata={**header, **_network_entries(adapters), "ss_base_model_version": version},
    )  # fmt: skip
    return Extracted(report, found, 1 - held / total)


def _changes(first: nn.Module, second: nn.Module, *, names: tuple[str, str]) -> dict[str, Tensor]:
    """Return what differs at all, by parameter."""
    ours, theirs = first.state_dict(), second.state_dict()
    wrong = [key for key in ours if key not in theirs or ours[key].shape != theirs[key].shape]
    if wrong or len(ours) != len(theirs):
        raise AdapterError(f"{names[0]} and {names[1]} are not of one size: {(wrong or ['their layers'])[0]} differs")
    return {key: theirs[key] - tensor for key, tensor in ours.items() if not torch.equal(theirs[key], tensor)}


def _layers(module: nn.Module, part: str, rank: int | None, conv_rank: int | None) -> dict[str, int | None]:
    """Return {layer: its largest rank}."""
    if part != UNET:
        return dict.fromkeys(_named(module, "kohya", TEXT), rank)
    if conv_rank is None:
        return dict.fromkeys(_named(module, "kohya", UNET), rank)
    kernels = set(_named(module, "conv_3x3", UNET))
    return {layer: conv_rank if layer in kernels else rank for layer in _named(module, "kohya_conv", UNET)}


def _named(module: nn.Module, preset: str, part: str) -> list[str]:
    return [layer.name for layer in chosen(module, expanded([preset], part), rank=1, alpha=1.0)[""]]


def _network_entries(parts: Mapping[str, Mapping[str, Adapter]]) -> dict[str, str]:
    ranks = {adapter.rank for adapters in parts.values() for adapter in adapters.values()}
    size = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    return {"ss_network_module": "networks.lora", "ss_network_dim": size, "ss_network_alpha": size}
