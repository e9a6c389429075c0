"""Put a file of adapters into weights, and write them as whole weights: no run needed.

Weights are changed in place, layer by layer: the peak is one copy of them in fp32.
"""

from pathlib import Path

import torch
from torch import Tensor

from training.config.saving import SaveConfig
from training.lora.adapter import AdapterError
from training.lora.layers import adaptable
from training.lora.merging import merge_into
from training.precision import DTYPES
from training.recipes.base import ExportFile
from training.stage_c.adaptable import layer_shapes, make_layered
from training.stage_c.adapter_files import AdapterFile, read_adapters
from training.stage_c.adapter_names import NETWORK, PRESETS, TEXT, apart, clip_layers, official_order
from training.stage_c.export import StageCWeights, export_stage_c
from training.stage_c.given_weights import GivenWeights, load_given
from training.stage_c.layouts import from_original
from training.stage_c.modelspec import modelspec
from training.stage_c.network import StageCNetwork


def merge_files(
    base: str, adapters: Path, output: Path, *, scale: float, save: SaveConfig, text_encoder: str | None
) -> list[ExportFile]:
    """Write `base` with `adapters` in it, in the formats of `save`. scale: 1 is as it was trained, 0 is the base.

    Raises AdapterError, also when it changes a text model and none is given; FileNotFoundError, WeightsError.
    """
    given = load_given(base, text_encoder=text_encoder)
    found = _read(adapters, given)
    network = from_original(given.network.state_dict(), "kohya")
    merge_into(network, apart(found.parts.get(NETWORK, {})), scale=scale, source=str(adapters))
    text_is_changed = bool(found.parts.get(TEXT)) or _has_known_tokens(found, given)
    if text_is_changed:
        if given.text_model is None:
            raise AdapterError(f"{adapters}: changes the text encoder, too: name one with --text-encoder")
        text = given.text_model.state_dict()
        merge_into(text, found.parts.get(TEXT, {}), scale=scale, source=str(adapters))
        _add_tokens(given.text_model.get_input_embeddings().weight, found, scale)
    weights = StageCWeights(
        network=given.network,
        text_model=given.text_model,
        tokenizer=given.tokenizer,
        text_is_trained=given.has_own_text or text_is_changed,
    )
    title = f"{Path(base).stem} with {adapters.stem}"
    merged_from = f"{Path(base).name}, {adapters.name} × {scale:g}"
    header = modelspec(title=title, width=1024, height=1024, extra={"merged_from": merged_from})
    return export_stage_c(weights, output, save=save, dtype=DTYPES[save.export_dtype], title=title, header=header)


def _read(path: Path, given: GivenWeights) -> AdapterFile:
    with torch.device("meta"):
        layered = StageCNetwork(given.network.config)
        make_layered(layered, together=True)
    names = [name for name in adaptable(layered) if name.endswith(tuple(_ends("official")))]
    text_layers = clip_layers(32) if given.text_model is None else adaptable(given.text_model)
    return read_adapters(path, shapes=layer_shapes(layered), order=official_order(names), text_layers=text_layers)


def _ends(preset: str) -> list[str]:
    return [pattern.removeprefix("*") for pattern in PRESETS[NETWORK][preset]]


def _has_known_tokens(found: AdapterFile, given: GivenWeights) -> bool:
    size = len(given.tokenizer)
    return any(number < size for number in found.tokens[0])


@torch.no_grad()
def _add_tokens(table: Tensor, found: AdapterFile, scale: float) -> None:
    """Change the rows of existing tokens. New ones are no part of a text model: they have files of their own."""
    ids, changes = found.tokens
    for number, change in zip(ids, changes, strict=True):
        if number < len(table):
            table[number] += scale * change.to(table)
