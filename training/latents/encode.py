"""Encode parts: pictures to latents, captions to text outputs, each part committed as it is done.

Pictures come through the training's own loader, so they are cut and resized as training from pixels would have them.
"""

import logging
import time
from collections import Counter
from functools import cached_property

import torch
from torch import Tensor

from sharding.files import LEFT_OVER_SECONDS, remove_temporaries
from sharding.images import is_too_broken
from training.batch_plan import BatchPlan, Step
from training.buckets import Placement
from training.chunk_data import Batch, ChunkData, ChunkSource, PixelSettings, make_loader
from training.config import RunConfig
from training.errors import BrokenDataError
from training.latents.parts import PartInfo, PartWriter
from training.latents.stored import DTYPES
from training.latents.wanted import Wanted, WantedCaptions, caption_id, in_batches, latent_id
from training.latents.work import ChunkWork
from training.precision import choose_device, set_exact
from training.recipes.encoders import ImageEncoder, TextEncoder, load_image_encoder, load_text_encoder
from training.tensor_file import bytes_of

logger = logging.getLogger(__name__)

BATCH_SIZE = 8
OVERFLOW = "latents_overflow"
NOT_FINITE = "not_finite"


class Encoders:
    """The frozen encoders of a run, on its device; each is loaded when it is first used."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self.device = choose_device(config.device)
        exact = config.precision.exact if config.precision.exact is not None else self.device.type == "cpu"
        set_exact(exact=exact, num_threads=config.precision.num_threads)

    @cached_property
    def image(self) -> ImageEncoder:
        return load_image_encoder(self._config, self.device)

    @cached_property
    def text(self) -> TextEncoder:
        return load_text_encoder(self._config, self.device)


def encode_chunk(work: ChunkWork, *, config: RunConfig, encoders: Encoders) -> Counter[str]:
    """Make the task's parts that are missing; return how many things are broken, by reason, of those made.

    Raises BrokenDataError when more of a chunk's pictures cannot be used than data.max_broken_fraction allows: the
    part is not committed then.
    """
    remove_temporaries(work.folder, min_age_seconds=LEFT_OVER_SECONDS)
    work.store.describe()
    reasons: Counter[str] = Counter()
    for number in work.missing():
        started = time.monotonic()
        with PartWriter(work.folder, number, dtype=work.store.dtype) as writer:
            if isinstance(work.wanted, Wanted):
                _write_latents(writer, work, number, config=config, encoder=encoders.image)
            else:
                _write_text(writer, work.wanted, number, config=config, encoders=encoders, dtype=work.store.dtype)
            reasons += writer.reasons
            _check_broken(work, reasons, config)
            info = writer.commit()
        _tell(work, number, info, time.monotonic() - started)
    return reasons


def _write_latents(
    writer: PartWriter, work: ChunkWork, number: int, *, config: RunConfig, encoder: ImageEncoder
) -> None:
    assert isinstance(work.wanted, Wanted)
    micro_batches = tuple(in_batches(work.wanted.part(number), BATCH_SIZE))
    plan = BatchPlan(work.chunk.name, 0, 0, BATCH_SIZE, len(micro_batches), (Step(0, micro_batches),))
    data = ChunkData(
        ChunkSource.of_chunk(work.chunk),
        plan,
        rank=0,
        world_size=1,
        pixels=PixelSettings(crop=work.store.rule["crop"], with_masks=False),
        with_checksum=config.data.verify_shards == "each_use",
    )
    loader = make_loader(data, workers=config.data.workers, prefetch=config.data.prefetch)
    try:
        for batch in loader:
            placements = micro_batches[batch.number].placements
            for is_flipped in (False, True)[: 1 + work.wanted.with_flips]:
                _add_latents(writer, batch, placements, encoder, is_flipped=is_flipped, dtype=DTYPES[work.store.dtype])
    finally:
        loader.close()


def _add_latents(
    writer: PartWriter,
    batch: Batch,
    placements: tuple[Placement, ...],
    encoder: ImageEncoder,
    *,
    is_flipped: bool,
    dtype: torch.dtype,
) -> None:
    assert batch.images is not None
    encoded = encoder.encode(batch.images.flip(-1) if is_flipped else batch.images)
    values = encoded.values.float().cpu()
    unread = dict(batch.broken)
    for slot, (identity, placed) in enumerate(zip(batch.identities, placements, strict=True)):
        reason = unread.get(identity.key, "")
        if not reason and slot in encoded.broken:
            reason = f"{NOT_FINITE}: {encoded.broken[slot]}"
        stored = values[slot].to(dtype)
        facts = {
            "id": latent_id(identity.key, placed, is_flipped=is_flipped), "key": identity.key,
            "bucket_width": placed.bucket.width, "bucket_height": placed.bucket.height,
            "resized_width": placed.resized_width, "resized_height": placed.resized_height,
            "left": batch.crops[slot][0], "top": batch.crops[slot][1], "is_flipped": is_flipped,
        }  # fmt: skip
        reason = reason or _unstorable([values[slot]], [stored])
        writer.add(facts, [bytes_of(stored)], [stored.shape], reason)


def _write_text(
    writer: PartWriter, wanted: WantedCaptions, number: int, *, config: RunConfig, encoders: Encoders, dtype: str
) -> None:
    captions = wanted.part(number)
    autocast = DTYPES.get(config.precision.autocast, torch.float32)
    for start in range(0, len(captions), BATCH_SIZE):
        some = captions[start : start + BATCH_SIZE]
        with torch.autocast(encoders.device.type, dtype=autocast, enabled=config.precision.autocast != "no"):
            tensors = [tensor.float().cpu() for tensor in encoders.text.encode(some)]
        for slot, caption in enumerate(some):
            values = [tensor[slot].contiguous() for tensor in tensors]
            stored = [one.to(DTYPES[dtype]) for one in values]
            facts = {"id": caption_id(caption), "caption": caption}
            writer.add(facts, list(map(bytes_of, stored)), [one.shape for one in stored], _unstorable(values, stored))


def _unstorable(values: list[Tensor], stored: list[Tensor]) -> str:
    """Return why tensors cannot be used as they would be stored, or ""."""
    if not all(bool(one.isfinite().all()) for one in values):
        return f"{NOT_FINITE}: in fp32 either"
    if not all(bool(one.isfinite().all()) for one in stored):
        largest = max(float(one.abs().max()) for one in values)
        return f'{OVERFLOW}: {largest:g} is too large for {stored[0].dtype}; set latents.dtype = "bf16"'
    return ""


def _check_broken(work: ChunkWork, reasons: Counter[str], config: RunConfig) -> None:
    allowed = config.data.max_broken_fraction
    if is_too_broken(reasons.total(), work.num_rows, max_broken_fraction=allowed):
        listing = ", ".join(f"{number:,} {reason}" for reason, number in reasons.most_common(3))
        raise BrokenDataError(
            f"{work.name}: {reasons.total():,} of {work.num_rows:,} cannot be used ({listing}; max_broken_fraction "
            f"{allowed}); run `python -m sharding verify`, or look at the encoder's weights"
        )


def _tell(work: ChunkWork, number: int, info: PartInfo, seconds: float) -> None:
    logger.info(
        "%s part %d of %d: %s rows, %s broken, %.1f MB in %.1f s (%.1f a second)",
        work.name, number, work.wanted.num_parts, f"{info.num_rows:,}", f"{info.num_broken:,}",
        info.data.num_bytes / 1e6, seconds, info.num_rows / max(seconds, 1e-9),
    )  # fmt: skip
