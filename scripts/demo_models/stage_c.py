"""Write a tiny Stable Cascade stage C, random but complete, in the file formats of the real one.

For the demo and the tests: 1 to 2 million parameters in place of 4.3 billion, same key layouts, same folder names,
the real CLIP vocabulary. The pictures it makes are noise. Same seed, same bytes.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from training.stage_c.effnet import EffNetEncoder
    from training.stage_c.network import StageCNetwork
    from training.stage_c.previewer import Previewer

Built = TypeVar("Built", bound=nn.Module)
TEXT_WIDTH, PROJECTION_WIDTH, TEXT_LAYERS, TEXT_HEADS, TEXT_MLP_WIDTH = 64, 48, 2, 4, 128


def make_stage_c_models(folder: Path, *, seed: int) -> dict[str, Path]:
    """Write the models into folder and return their paths by name; about 17 MB, a few seconds, one process.

    Names: stage_c (.safetensors, original layout, its config in the metadata), text_encoder (folder), tokenizer
    (folder), effnet (.safetensors), previewer (.safetensors).
    """
    from training.stage_c.clip_vocabulary import write_tokenizer_files
    from training.stage_c.effnet import save_effnet
    from training.stage_c.formats import save_stage_c
    from training.stage_c.modelspec import modelspec
    from training.stage_c.previewer import save_previewer

    generator = torch.Generator().manual_seed(seed)
    paths = {
        "stage_c": folder / "stage_c.safetensors",
        "text_encoder": folder / "text_encoder",
        "tokenizer": folder / "tokenizer",
        "effnet": folder / "effnet_encoder.safetensors",
        "previewer": folder / "previewer.safetensors",
    }
    header = modelspec(title="tiny random stage C", width=256, height=256)
    save_stage_c(_make_network(generator), paths["stage_c"], metadata=header)
    _write_text_encoder(paths["text_encoder"], generator)
    write_tokenizer_files(paths["tokenizer"])
    save_effnet(_make_effnet(generator), paths["effnet"])
    save_previewer(_make_previewer(generator), paths["previewer"])
    return paths


def _fill(module: nn.Module, generator: torch.Generator, *, gain: float) -> None:
    """Give matrices and kernels normal weights of deviation gain / sqrt(inputs), batch norms 1, the rest 0.

    Written out because torch's default initialisation would draw from the global generator.
    """
    transposed = {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, nn.ConvTranspose2d)}
    for name, parameter in sorted(module.named_parameters()):
        is_vector = parameter.numel() == max(parameter.shape)
        # Each output pixel of a stride 2, kernel 2 transposed convolution has one input pixel of shape[0] channels.
        num_inputs = parameter.shape[0] if name in transposed else parameter[0].numel()
        values = torch.randn(parameter.shape, generator=generator) * gain / num_inputs**0.5
        parameter.data.copy_(torch.zeros_like(values) if is_vector else values)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.reset_parameters()


def _empty(build: Callable[[Any], Built], config: object) -> Built:
    """Return a module on the CPU whose weights are not initialised yet."""
    with torch.device("meta"):
        module = build(config)
    module.to_empty(device="cpu")
    return module


def _make_network(generator: torch.Generator) -> "StageCNetwork":
    from training.stage_c.network import StageCConfig, StageCNetwork

    config = StageCConfig(
        c_cond=64,
        c_hidden=(64, 64),
        num_heads=(4, 4),
        blocks_down=(1, 1),
        blocks_up=(1, 1),
        c_clip_text=TEXT_WIDTH,
        c_clip_text_pooled=PROJECTION_WIDTH,
        c_clip_img=32,
    )
    network = _empty(StageCNetwork, config)
    _fill(network, generator, gain=0.5)
    return network


def _write_text_encoder(folder: Path, generator: torch.Generator) -> None:
    """Write a CLIPTextModelWithProjection folder by its published key names, without importing transformers."""
    from training.stage_c.clip_vocabulary import VOCABULARY_SIZE
    from training.weight_files import write_tensors

    shapes: dict[str, tuple[int, ...]] = {
        "text_model.embeddings.token_embedding.weight": (VOCABULARY_SIZE, TEXT_WIDTH),
        "text_model.embeddings.position_embedding.weight": (77, TEXT_WIDTH),
        "text_projection.weight": (PROJECTION_WIDTH, TEXT_WIDTH),
    }
    norms = ["text_model.final_layer_norm"]
    for layer in range(TEXT_LAYERS):
        prefix = f"text_model.encoder.layers.{layer}"
        norms += [f"{prefix}.layer_norm1", f"{prefix}.layer_norm2"]
        linears: dict[str, tuple[int, ...]] = {
            f"self_attn.{name}_proj": (TEXT_WIDTH, TEXT_WIDTH) for name in ("q", "k", "v", "out")
        }
        linears |= {"mlp.fc1": (TEXT_MLP_WIDTH, TEXT_WIDTH), "mlp.fc2": (TEXT_WIDTH, TEXT_MLP_WIDTH)}
        for name, shape in linears.items():
            shapes[f"{prefix}.{name}.weight"] = shape
            shapes[f"{prefix}.{name}.bias"] = shape[:1]
    tensors: dict[str, Tensor] = {}
    for name, shape in sorted(shapes.items()):
        deviation = 0.0 if len(shape) == 1 else 0.5 if "embedding" in name else shape[1] ** -0.5
        tensors[name] = torch.randn(shape, generator=generator) * deviation
    for norm in norms:
        tensors |= {f"{norm}.weight": torch.ones(TEXT_WIDTH), f"{norm}.bias": torch.zeros(TEXT_WIDTH)}
    write_tensors(folder / "model.safetensors", tensors)
    config: Mapping[str, object] = {
        "architectures": ["CLIPTextModelWithProjection"],
        "attention_dropout": 0.0,
        "bos_token_id": 49_406,
        "eos_token_id": 49_407,
        "hidden_act": "gelu",
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": TEXT_MLP_WIDTH,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": TEXT_HEADS,
        "num_hidden_layers": TEXT_LAYERS,
        "pad_token_id": 49_407,
        "projection_dim": PROJECTION_WIDTH,
        "vocab_size": VOCABULARY_SIZE,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _make_effnet(generator: torch.Generator) -> "EffNetEncoder":
    """Return a narrow encoder whose latents of ordinary pictures have about mean 0 and deviation 1 per channel."""
    from training.stage_c.effnet import EffNetConfig, EffNetEncoder

    config = EffNetConfig(stem_width=8, widths=(8, 12, 16, 24, 32, 48), depths=(1, 2, 2, 2, 2, 2), head_width=64)
    encoder = _empty(EffNetEncoder, config)
    _fill(encoder, generator, gain=1.4)
    # Smooth random pictures: noise at 4 x 4, enlarged. Rounded, so that a last bit of arithmetic does not show.
    coarse = torch.rand((16, 3, 4, 4), generator=generator)
    latents = encoder.encode(nn.functional.interpolate(coarse, size=(128, 128), mode="bicubic").clamp(0, 1))
    statistics = {
        "running_mean": latents.mean(dim=(0, 2, 3)),
        "running_var": latents.var(dim=(0, 2, 3)).clamp_min(1e-2),
    }
    for name, value in statistics.items():
        encoder.mapper[1].get_buffer(name).copy_(value.round(decimals=2))
    return encoder


def _make_previewer(generator: torch.Generator) -> "Previewer":
    from training.stage_c.previewer import Previewer, PreviewerConfig

    previewer = _empty(Previewer, PreviewerConfig(widths=(32, 24, 16, 16)))
    _fill(previewer, generator, gain=1.4)
    last = previewer.blocks[-1]
    for name, factor, offset in (("weight", 0.3, 0.0), ("bias", 0.0, 0.5)):
        last.get_parameter(name).data.mul_(factor).add_(offset)
    return previewer
