"""Write a single file: what was trained laid over the file that training started from.

Unknown keys, another VAE and schedule buffers of the source survive, word for word; only floating point tensors are
cast. Of the source's header survives what holds for what is made of it: licence, and what it was merged from.
"""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sharding.files import replacing
from training.dreambooth.single_file.layout import (
    EMA_PREFIX,
    VAE_PREFIX,
    Family,
    Parts,
    filled_up,
    original_tensors,
)
from training.dreambooth.single_file.reading import open_single_file
from training.tensor_file import bytes_of, header_of
from training.weight_files import OpenWeights, WeightsError, WeightsReport, converted, write_tensors

logger = logging.getLogger(__name__)

MARKERS = ("v_pred", "ztsnr")
"""Empty tensors by which ComfyUI, A1111 and Forge know an SDXL that predicts v, or was trained to zero terminal SNR."""
_INHERITED = ("modelspec.license", "modelspec.merged_from", "modelspec.usage_hint", "sd_merge_")
"""Header entries, by their beginnings. Hashes, titles, `ss_*` and the like are of the source's own making."""
_HASH = "modelspec.hash_sha256"


def write_single_file(
    path: Path,
    parts: Parts,
    *,
    family: Family,
    source: Path | None = None,
    dtype: torch.dtype | None = None,
    markers: tuple[str, ...] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> WeightsReport:
    """Write `path`, .safetensors or .ckpt. source: the file that training started from; its other keys are kept.

    markers: those of MARKERS that hold; None keeps the source's. The source's running average (`model_ema.`) is left
    out: it is of the weights before training; `parts` may hold another. A ModelSpec header gets the tensors' hash.
    Raises WeightsError when the source is of another family or size, ValueError for parameters of no such model.
    """
    own = original_tensors(family, parts)
    marks = {name: torch.empty(0) for name in markers or ()}
    if source is None:
        return _write(path, {**filled_up(family, own), **marks}, dtype=dtype, metadata=metadata or {})
    with open_single_file(source) as file:
        own = _overlay(file, own)
        dropped = {key for key in file.shapes if key.startswith(EMA_PREFIX) or (markers is not None and key in MARKERS)}
        if averages := sum(key.startswith(EMA_PREFIX) for key in dropped):
            logger.info("%s: %d tensors of a running average left out: of before training", source, averages)
        kept = {key: file.tensor(key) for key in file.shapes if key not in own and key not in dropped}
        inherited = {key: value for key, value in file.metadata.items() if key.startswith(_INHERITED)}
        return _write(path, {**own, **kept, **marks}, dtype=dtype, metadata={**inherited, **(metadata or {})})


def _overlay(file: OpenWeights, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return our tensors in the source's shapes. Raises WeightsError when they are not of the source's model.

    A VAE may be added to a file without one; its attention may have been written as 1 x 1 convolutions, or not.
    """
    missing = sorted(key for key in own if key not in file.shapes and not key.startswith((VAE_PREFIX, EMA_PREFIX)))
    if missing:
        raise WeightsError(
            f"{file.path}: has no {missing[0]} and {len(missing) - 1} others of {len(own)}: it is not the file that "
            "this training started from"
        )
    found: dict[str, Tensor] = {}
    for key, tensor in own.items():
        shape = file.shapes.get(key, tuple(tensor.shape))
        if key.startswith(VAE_PREFIX) and tensor.squeeze().shape == torch.Size(side for side in shape if side != 1):
            tensor = tensor.reshape(shape)
        if tuple(tensor.shape) != shape:
            raise WeightsError(
                f"{file.path}: {key} is {shape}, ours {tuple(tensor.shape)}: it is not the file that this training "
                "started from"
            )
        found[key] = tensor
    return found


def _write(
    path: Path, tensors: Mapping[str, Tensor], *, dtype: torch.dtype | None, metadata: Mapping[str, str]
) -> WeightsReport:
    if path.suffix == ".safetensors":
        if "modelspec.sai_model_spec" in metadata:
            metadata = {**metadata, _HASH: f"0x{_hash_of(path, tensors, dtype)}"}
        return write_tensors(path, tensors, dtype=dtype, metadata=metadata)
    if path.suffix == ".ckpt":
        return _write_ckpt(path, tensors, dtype)
    raise ValueError(f"{path}: a single file ends in .safetensors or .ckpt")


def _hash_of(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> str:
    """Return the SHA-256 of what stands behind the header of the file that is to be written, as ModelSpec wants it."""
    formats = {key: converted(tensor[:0] if tensor.dim() else tensor, dtype).dtype for key, tensor in tensors.items()}
    names, _ = header_of(path, {key: (formats[key], tensor.shape) for key, tensor in tensors.items()})
    digest = hashlib.sha256()
    for name in names:
        digest.update(bytes_of(converted(tensors[name].detach(), dtype).cpu().contiguous()))
    return digest.hexdigest()


def _write_ckpt(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> WeightsReport:
    """Write a pickle of tensors only, as `torch.load(weights_only=True)` reads it. It has no place for metadata."""
    cast = {key: converted(tensor.detach(), dtype).cpu().contiguous() for key, tensor in tensors.items()}
    with replacing(path) as temporary:
        # A tensor that is a view would be written with all that it is a view of.
        whole = {key: one.clone() if one.untyped_storage().nbytes() > one.nbytes else one for key, one in cast.items()}
        torch.save({"state_dict": whole}, temporary)
        read = torch.load(temporary, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
        if read.keys() != cast.keys() or not all(bytes_of(read[key]) == bytes_of(cast[key]) for key in cast):
            raise WeightsError(f"{path}: the disk gives back other bytes than were written")
    overflowed = {key: int((tensors[key].cpu().isfinite() & ~one.isfinite()).sum()) for key, one in cast.items()}
    return WeightsReport(
        path=path,
        num_tensors=len(cast),
        num_values=sum(tensor.numel() for tensor in cast.values()),
        num_bytes=path.stat().st_size,
        num_overflowed=sum(overflowed.values()),
        num_vanished=sum(int(((tensors[key].cpu() != 0) & (one == 0)).sum()) for key, one in cast.items()),
        overflowed_keys=tuple(key for key, count in overflowed.items() if count),
    )
