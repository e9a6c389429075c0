"""Write a single file: what was trained laid over the file that training started from.

Unknown keys, another VAE, schedule buffers and markers of the source survive; only floating point tensors are cast.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sharding.files import replacing
from training.dreambooth.single_file.layout import EMA_PREFIX, Family, Parts, filled_up, original_tensors
from training.tensor_file import bytes_of
from training.weight_files import WeightsError, WeightsReport, open_weights, write_tensors

MARKERS = ("v_pred", "ztsnr")
"""Empty tensors by which ComfyUI, A1111 and Forge know an SDXL that predicts v, or was trained to zero terminal SNR."""


def write_single_file(
    path: Path,
    parts: Parts,
    *,
    family: Family,
    source: Path | None = None,
    dtype: torch.dtype | None = None,
    markers: tuple[str, ...] = (),
    metadata: Mapping[str, str] | None = None,
) -> WeightsReport:
    """Write `path`, .safetensors or .ckpt. source: the file that training started from; its other keys are kept.

    The source's running average (`model_ema.`) is left out: it is of the weights before training.
    Raises WeightsError when the source is of another family or size, ValueError for parameters of no such model.
    """
    own = original_tensors(family, parts)
    if source is None:
        tensors = filled_up(family, own)
        return _write(path, {**tensors, **_marks(markers)}, dtype=dtype, metadata=metadata)
    with open_weights(source) as file:
        kept = [key for key in file.keys if key not in own and not key.startswith(EMA_PREFIX)]
        _check_overlay(source, own, {key: file.tensor(key) for key in file.keys if key in own})
        tensors = own | {key: file.tensor(key) for key in kept}
        return _write(path, {**tensors, **_marks(markers)}, dtype=dtype, metadata={**file.metadata, **(metadata or {})})


def _check_overlay(source: Path, own: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    if missing := sorted(own.keys() - theirs.keys()):
        raise WeightsError(
            f"{source}: has no {missing[0]} and {len(missing) - 1} others of {len(own)}: it is not the file that this "
            "training started from"
        )
    wrong = [key for key, tensor in own.items() if tensor.shape != theirs[key].shape]
    if wrong:
        shapes = f"{tuple(theirs[wrong[0]].shape)}, ours {tuple(own[wrong[0]].shape)}"
        raise WeightsError(f"{source}: {wrong[0]} is {shapes}: it is not the file that this training started from")


def _marks(markers: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: torch.empty(0) for name in markers}


def _write(
    path: Path, tensors: Mapping[str, Tensor], *, dtype: torch.dtype | None, metadata: Mapping[str, str] | None
) -> WeightsReport:
    if path.suffix == ".safetensors":
        return write_tensors(path, tensors, dtype=dtype, metadata=metadata)
    if path.suffix == ".ckpt":
        return _write_ckpt(path, tensors, dtype)
    raise ValueError(f"{path}: a single file ends in .safetensors or .ckpt")


def _write_ckpt(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> WeightsReport:
    """Write a pickle of tensors only, as `torch.load(weights_only=True)` reads it. It has no place for metadata."""
    cast = {
        key: tensor.detach().cpu().to(dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype)
        for key, tensor in tensors.items()
    }
    with replacing(path) as temporary:
        torch.save({"state_dict": {key: tensor.contiguous() for key, tensor in cast.items()}}, temporary)
        read = torch.load(temporary, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
        if read.keys() != cast.keys() or not all(bytes_of(read[key]) == bytes_of(cast[key]) for key in cast):
            raise WeightsError(f"{path}: the disk gives back other bytes than were written")
    overflowed = {key: int((tensors[key].isfinite() & ~one.isfinite()).sum()) for key, one in cast.items()}
    return WeightsReport(
        path=path,
        num_tensors=len(cast),
        num_values=sum(tensor.numel() for tensor in cast.values()),
        num_bytes=path.stat().st_size,
        num_overflowed=sum(overflowed.values()),
        num_vanished=sum(int(((tensors[key] != 0) & (one == 0)).sum()) for key, one in cast.items()),
        overflowed_keys=tuple(key for key, count in overflowed.items() if count),
    )
