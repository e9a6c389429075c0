"""Read one picture of a concept and measure all that is asked of it; judges nothing."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from sharding.images import ImageError, ImageFacts, decode_rgb, hash_picture, is_flat, probe
from training.bucket_list import BucketSettings
from training.buckets import placement
from training.dreambooth.doctor.boxes import FACE, PERSON, Box
from training.dreambooth.doctor.captions import Caption, read_caption
from training.dreambooth.doctor.detector import Detector
from training.dreambooth.doctor.pixels import Bars, PixelNumbers, find_bars, measure
from training.dreambooth.doctor.text_areas import TextBox, find_text
from training.dreambooth.doctor.traces import Traces, find_traces

THUMBNAIL_SIDE = 200

# Pixels of DV, DVD and HDV, which are not square: film that was not stretched back.
_ANAMORPHIC = {(720, 480), (720, 576), (1440, 1080), (704, 480), (704, 576), (352, 288), (352, 240)}
_ORIENTATION = 0x0112
_RING = 0.18  # share of each side that is taken for background
_RING_CELLS = 24


@dataclass(frozen=True)
class Measured:
    """What is known of a picture that can be decoded."""

    facts: ImageFacts
    numbers: PixelNumbers
    bars: Bars
    text: tuple[TextBox, ...]
    traces: Traces
    upscale: float
    """Factor by which it is enlarged to its bucket; below 1 it is made smaller."""
    crop_loss: float
    """Share that its bucket cuts off."""
    bucket: str
    window: Box
    """What is left of it in its bucket."""
    pixel_aspect: float
    """Width of a pixel by its height, as the file says."""
    phash: int | None
    """64 bits; None for a flat picture."""
    ring: npt.NDArray[np.bool_] | None
    """Brighter or darker than its neighbour, around the border; None when that is flat."""
    thumbnail: bytes
    """WebP."""
    boxes: tuple[Box, ...] | None = None
    """What a detector found; None without one."""

    @property
    def subject(self) -> tuple[Box, ...]:
        """The largest person that was found, else the largest face; nobody without a detector."""
        found = self.boxes or ()
        people = [box for box in found if box.label == PERSON] or [box for box in found if box.label == FACE]
        return (max(people, key=lambda box: box.area),) if people else ()


@dataclass(frozen=True)
class Picture:
    """A file of a concept. Either `measured` or `error` is set."""

    path: Path
    caption: Caption | None
    measured: Measured | None
    error: str = ""


def read_picture(
    path: Path, *, caption_extension: str, buckets: BucketSettings, detector: Detector | None = None
) -> Picture:
    """Read a picture and the caption beside it. What cannot be decoded has `error`; raises OSError if unreadable."""
    caption = read_caption(path.with_suffix(caption_extension))
    data = path.read_bytes()
    try:
        return Picture(path, caption, _measured(data, buckets, detector))
    except ImageError as error:
        return Picture(path, caption, None, str(error))


def read_phash(path: Path) -> int | None:
    """Return only the perceptual hash of a picture; None when it cannot be decoded, or is flat."""
    try:
        return _phash(decode_rgb(path.read_bytes()))
    except ImageError:
        return None


def is_anamorphic(width: int, height: int) -> bool:
    """Tell whether a size is one of film whose pixels are not square."""
    return (width, height) in _ANAMORPHIC


def _measured(data: bytes, buckets: BucketSettings, detector: Detector | None) -> Measured:
    facts = probe(data)
    image = decode_rgb(data)
    place = placement(*image.size, settings=buckets)
    bucket = place.bucket
    resized = image.resize((place.resized_width, place.resized_height), Image.Resampling.LANCZOS)
    left, top = (resized.width - bucket.width) // 2, (resized.height - bucket.height) // 2
    far = ((left + bucket.width) / resized.width, (top + bucket.height) / resized.height)
    trained = resized.crop((left, top, left + bucket.width, top + bucket.height))
    return Measured(
        facts=facts,
        numbers=measure(trained),
        bars=find_bars(image),
        text=tuple(find_text(image)),
        traces=find_traces(image, data),
        upscale=place.resized_width / image.width,
        crop_loss=place.crop_loss_fraction,
        bucket=str(bucket),
        window=Box("", left / resized.width, top / resized.height, *far),
        pixel_aspect=pixel_aspect(data),
        phash=_phash(image),
        ring=_ring(image),
        thumbnail=_thumbnail(image),
        boxes=None if detector is None else tuple(detector(image)),
    )


def pixel_aspect(data: bytes) -> float:
    """Return the width of a pixel by its height, as the file says; 1 when it says nothing."""
    with Image.open(io.BytesIO(data)) as image:
        across, down = image.info.get("jfif_density") or image.info.get("dpi") or (1, 1)
    return float(down) / float(across) if across and down else 1.0


def orientation(data: bytes) -> int:
    """Return EXIF's number of how the picture is turned; 1 is upright, and so is what says nothing."""
    with Image.open(io.BytesIO(data)) as image:
        return int(image.getexif().get(_ORIENTATION, 1))


def _phash(image: Image.Image) -> int | None:
    return int.from_bytes(hash_picture(image, algorithm="phash", hash_size=8)) or None


def _ring(image: Image.Image) -> npt.NDArray[np.bool_] | None:
    """Return in which places of the border ring the picture becomes brighter to the right, and downwards."""
    small = image.convert("L").resize((_RING_CELLS + 1, _RING_CELLS + 1), Image.Resampling.BOX)
    luma = np.asarray(small, np.int16)
    wide = round(_RING_CELLS * _RING)
    is_ring = np.ones((_RING_CELLS, _RING_CELLS), bool)
    is_ring[wide:, wide:-wide] = False  # a figure stands on the ground: below it there is no background
    steps = np.stack([np.diff(luma, axis=1)[:-1], np.diff(luma, axis=0)[:, :-1]])[:, is_ring]
    return None if is_flat(image) or (np.abs(steps) > 3).mean() < 0.3 else np.asarray(steps > 0)


def _thumbnail(image: Image.Image) -> bytes:
    small = image.copy()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=70)
    return buffer.getvalue()
