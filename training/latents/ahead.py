"""What a launch reads instead of decoding pictures and running a text encoder, where its settings say so."""

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from training.batch_plan import BatchPlan
from training.caption_text import CaptionSettings
from training.config import RunConfig
from training.latents.store import Store, latent_store, require_complete, text_store
from training.latents.stored import Ahead, StoredTensors
from training.latents.wanted import wanted_captions, wanted_pictures
from training.loading.pixels import PixelSettings


def ahead_of(
    index: pa.Table,
    plans: Sequence[BatchPlan],
    *,
    config: RunConfig,
    pixels: PixelSettings,
    captions: CaptionSettings,
    from_main: Callable[[Callable[[], Any]], Any],
) -> Ahead:
    """Return what was encoded ahead of all that `plans` (of one chunk) show; every rank has to call it.

    pixels, captions: how the chunk is loaded. from_main: asks rank 0, which alone hashes encoders.
    Raises LatentsError, naming the command, when something is missing or damaged.
    """
    with_checksum = config.data.verify_shards == "each_use"

    def stored(store: Store, wanted_digest: str, num_parts: int) -> StoredTensors:
        folder = require_complete(store, plans[0].chunk, wanted_digest, num_parts=num_parts)
        return StoredTensors(folder, num_parts=num_parts, with_checksum=with_checksum)

    latents = text = None
    if config.latents.use:
        pictures = wanted_pictures(index, plans, with_flips=pixels.flip_fraction > 0, with_masks=pixels.crop == "focus")
        store = from_main(lambda: latent_store(config, crop=pixels.crop))
        latents = stored(store, pictures.digest, pictures.num_parts)
    if config.latents.text:
        wanted = wanted_captions(index, plans, settings=captions)
        store = from_main(lambda: text_store(config))
        text = stored(store, wanted.digest, wanted.num_parts)
    return Ahead(latents, text)
