"""Read an export back as other programs do, and compare: every tensor, and what the parts make of fixed inputs.

Tensors of trained parts must be those in memory, cast, bit for bit. Outputs are compared with those of a module made
with the settings in memory and the tensors read back, so that a layout, a number of heads or an activation that was
lost shows, and rounding does not. In fp32 on the CPU, one part at a time: it takes the memory of the export and once
more its largest part in fp32, 5 GB for SD 1 and 15 GB for SDXL in half.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from training.dreambooth.export.content import SdWeights
from training.dreambooth.export.folder import TOKENIZER_NAMES
from training.dreambooth.export.model_card import PIPELINES
from training.dreambooth.sd_models.file_parts import empty
from training.dreambooth.sd_models.folders import AVERAGE_FOLDER, folder_unet
from training.dreambooth.sd_models.models import TEXT_NAMES, SdModel, load_average, load_sd
from training.dreambooth.sd_models.prediction import Prediction
from training.dreambooth.single_file.text_names import with_prefix
from training.dreambooth.text import pad_ids
from training.recipes.base import ExportFile
from training.tensor_file import bytes_of
from training.weight_files import WeightsError, converted, load_into

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENS = (49406, 320, 2368, 539, 320, 1929, 49407)
"""A photo of a cat, or the like: any ids of CLIP's vocabulary, begin and end."""
_SAME = 1e-5
"""Of the largest output. The sums are the same sums; only their order may differ between two runs."""


class ExportMismatchError(WeightsError):
    """What was read back is not what was written; the export was removed."""


@dataclass(frozen=True)
class _ReadBack:
    """An export as other programs see it."""

    modules: dict[str, nn.Module]
    prediction: Prediction
    tokenizers: "tuple[PreTrainedTokenizerBase, ...]"


def verify_export(files: Sequence[ExportFile], content: SdWeights, *, dtype: torch.dtype) -> None:
    """Read each file or folder back and compare it with the weights in memory, cast to dtype.

    Raises ExportMismatchError naming the file, the part and the difference; the file or folder is removed then.
    """
    for file in files:
        try:
            _verify(file.path, content, dtype)
        except (ValueError, RuntimeError, KeyError, OSError) as error:  # what libraries raise of files they cannot use
            if file.path.is_dir():
                shutil.rmtree(file.path)
            else:
                file.path.unlink(missing_ok=True)
            if isinstance(error, ExportMismatchError):
                raise
            raise ExportMismatchError(f"{file.path}: cannot be read back: {error}") from error


def _verify(path: Path, content: SdWeights, dtype: torch.dtype) -> None:
    model = content.model
    read = _read_folder(path, content, dtype) if path.is_dir() else _read_file(path, content, dtype)
    wanted = (model.prediction.kind, model.prediction.zero_terminal_snr)
    if (found := (read.prediction.kind, read.prediction.zero_terminal_snr)) != wanted:
        raise ExportMismatchError(f"{path}: says prediction, zero terminal SNR {found}, not {wanted}")
    kept = content.kept if not path.is_dir() else frozenset()
    settings = _modules(model) | ({AVERAGE_FOLDER: model.unet} if content.average is not None else {})
    for name, tensors in _tensors(content).items():
        module = read.modules.pop(name)  # so that it takes no memory once compared
        theirs: Mapping[str, Tensor] = module.state_dict()
        if name in TEXT_NAMES:
            theirs, tensors = with_prefix(theirs), with_prefix(tensors)
        _compare_tensors(f"{path}: {name}", theirs, tensors, dtype=dtype, is_kept=name in kept)
        _compare_outputs(f"{path}: {name}", module, settings[name])
    for tokenizer, pad_id in zip(read.tokenizers, pad_ids(model.family), strict=False):
        _compare_tokens(f"{path}: tokenizer", tokenizer, content.tokenizer, pad_id)


# --- reading ---


def _read_file(path: Path, content: SdWeights, dtype: torch.dtype) -> _ReadBack:
    model = content.model
    # Nothing in an SD 2's .ckpt can say that it predicts noise: its readers must be told.
    is_mute = path.suffix == ".ckpt" and model.family == "sd2" and model.prediction.kind == "epsilon"
    read = load_sd(str(path), dtype=dtype, prediction="epsilon" if is_mute else None)
    modules = _modules(read)
    if content.average is not None:
        modules[AVERAGE_FOLDER] = load_average(read, dtype=dtype)
    return _ReadBack(modules, read.prediction, ())


def _read_folder(path: Path, content: SdWeights, dtype: torch.dtype) -> _ReadBack:
    import diffusers

    with _quiet():
        pipeline = getattr(diffusers, PIPELINES[content.model.family]).from_pretrained(
            path, torch_dtype=dtype, local_files_only=True
        )
    modules = {name: getattr(pipeline, name) for name in _modules(content.model)}
    if content.average is not None:
        modules[AVERAGE_FOLDER] = folder_unet(str(path), dtype, average=True)
    settings = pipeline.scheduler.config
    return _ReadBack(
        modules,
        Prediction(settings["prediction_type"], settings["rescale_betas_zero_snr"], "the folder"),
        tuple(getattr(pipeline, name) for name in TOKENIZER_NAMES[: len(content.model.texts)]),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Show no progress bars: their lines fill log files."""
    import diffusers.utils.logging
    import transformers.utils.logging

    libraries = [one for one in (diffusers.utils.logging, transformers.utils.logging) if one.is_progress_bar_enabled()]
    for one in libraries:
        one.disable_progress_bar()
    try:
        yield
    finally:
        for one in libraries:
            one.enable_progress_bar()


def _modules(model: SdModel) -> dict[str, nn.Module]:
    return {"unet": model.unet, "vae": model.vae, **dict(zip(TEXT_NAMES, model.texts, strict=False))}


def _tensors(content: SdWeights) -> dict[str, Mapping[str, Tensor]]:
    whole = content.whole
    named = {"unet": whole.unet, "vae": whole.vae, AVERAGE_FOLDER: whole.average}
    named |= dict(zip(TEXT_NAMES, whole.texts, strict=False))
    return {name: tensors for name, tensors in named.items() if tensors is not None}


# --- comparing ---


def _compare_tensors(
    where: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, dtype: torch.dtype, is_kept: bool
) -> None:
    """Raise ExportMismatchError unless tensors are equal.

    is_kept: they come from the source file, and those in memory may have been rounded to a format of their own.
    """
    if odd := sorted(found.keys() ^ wanted.keys()):
        raise ExportMismatchError(f"{where}: {len(odd)} tensors are missing or too many, first {odd[0]}")
    for key, tensor in wanted.items():
        ours, theirs = converted(tensor.detach(), dtype).cpu().contiguous(), found[key].contiguous()
        if ours.shape == theirs.shape and bytes_of(ours) == bytes_of(theirs):
            continue
        if is_kept and tensor.dtype != torch.float32:
            coarse = max(torch.finfo(tensor.dtype).eps, torch.finfo(dtype).eps)
            if torch.allclose(ours.float(), theirs.float(), rtol=coarse, atol=1e-7):
                continue
        raise ExportMismatchError(f"{where}: {key} differs: {_difference(theirs, ours)}")


def _compare_outputs(where: str, read: nn.Module, settings: nn.Module) -> None:
    """Raise ExportMismatchError unless a module makes the same of fixed inputs as one with these settings would."""
    read = read.float()
    reference = empty(_maker(settings))
    load_into(reference, read.state_dict(), source=where)
    with torch.no_grad():
        for found, wanted in zip(_outputs(read), _outputs(reference.eval()), strict=True):
            limit = _SAME * max(float(wanted.nan_to_num().abs().max()), 1e-3)
            if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=0, atol=limit, equal_nan=True):
                raise ExportMismatchError(f"{where}: outputs differ: {_difference(found, wanted)}")


def _maker(settings: nn.Module) -> Callable[[], nn.Module]:
    kind: Any = type(settings)
    if hasattr(kind, "load_config"):  # diffusers
        values = {key: value for key, value in settings.config.items() if not key.startswith("_")}  # type: ignore[union-attr, operator]
        return lambda: kind(**values)
    return lambda: kind(settings.config)


def _outputs(module: Any) -> list[Tensor]:
    """Return what a UNet, a VAE or a text model makes of fixed inputs, all of it."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if hasattr(module, "decode"):
        picture = noise(1, 3, 64, 64)
        posterior = module.encode(picture).latent_dist
        return [posterior.mean, module.decode(posterior.mean).sample]
    if not hasattr(module, "conv_in"):
        output = module(torch.tensor([[*_TOKENS, *[_TOKENS[-1]] * (77 - len(_TOKENS))]]), output_hidden_states=True)
        return [*output.hidden_states, output[0]]
    config, added = module.config, None
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": noise(1, pooled), "time_ids": torch.tensor([[512.0, 512, 0, 0, 512, 512]])}
    latents, states = noise(1, 4, 16, 16), noise(1, 77, config.cross_attention_dim)
    return [module(latents, 500, encoder_hidden_states=states, added_cond_kwargs=added).sample]


def _compare_tokens(
    where: str, found: "PreTrainedTokenizerBase", wanted: "PreTrainedTokenizerBase", pad_id: int
) -> None:
    text = "1girl, (long hair:1.2), a photo of <sks> 魔法 " + " ".join(sorted(wanted.get_added_vocab()))
    theirs, ours = found(text)["input_ids"], wanted(text)["input_ids"]
    if theirs != ours or found.pad_token_id != pad_id:
        raise ExportMismatchError(
            f"{where}: makes {len(theirs)} other ids, or fills up with {found.pad_token_id} instead of {pad_id}"
        )


def _difference(found: Tensor, wanted: Tensor) -> str:
    if found.shape != wanted.shape:
        return f"{tuple(found.shape)} instead of {tuple(wanted.shape)}"
    apart = (found.double() - wanted.double()).abs()
    return f"by up to {float(apart.max()):.3g} of {float(wanted.double().abs().max()):.3g}"
