"""Make class images that are not there, each a PNG named by all that makes it; what is there is never made again.

A PNG tells in its text `class_image` what made it and in `parameters` the same for web UIs. It is written whole or not
at all, so a run that is killed goes on where it was. Files of other models may lie beside: they have other names.
"""

import io
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sharding.files import LEFT_OVER_SECONDS, open_replacing, read_file, remove_temporaries
from training.dreambooth.class_images.wanted import ClassImage, key
from training.dreambooth.sampling.drawing import draw_pictures
from training.dreambooth.sampling.networks import SdPictures
from training.preview import parameters

logger = logging.getLogger(__name__)

TEXT = "class_image"


def make_class_images(
    wanted: Sequence[ClassImage],
    folder: Path,
    *,
    networks: SdPictures,
    model_digest: str,
    batch_size: int = 1,
    rank: int = 0,
    world_size: int = 1,
    on_made: Callable[[Path], None] | None = None,
) -> list[Path]:
    """Make those of `wanted` that are not in the folder, and return the paths of all, in order.

    model_digest: `model.digest(networks)`. batch_size: how many of one size are drawn at once, on a GPU. Of several
    processes each makes its share; wait for all of them before the paths are read. on_made is called after each file.
    Raises ValueError when an image cannot be drawn; those before it are there.
    """
    paths = {image: path_of(image, folder, model_digest=model_digest) for image in wanted}
    share = [image for image in list(paths)[rank::world_size] if not is_made(image, paths[image])]
    if share:
        remove_temporaries(folder, min_age_seconds=LEFT_OVER_SECONDS)
        logger.info("class images: making %d of %d in %s", len(share), len(paths), folder)
        share.sort(key=_alike)
        pictures = draw_pictures([image.as_prompt() for image in share], networks=networks, batch_size=batch_size)
        for image, picture in zip(share, pictures, strict=True):
            _write(paths[image], image, picture)
            if on_made is not None:
                on_made(paths[image])
    return [paths[image] for image in wanted]


def path_of(image: ClassImage, folder: Path, *, model_digest: str) -> Path:
    """Return where an image lies once it is made."""
    return folder / f"{key(image, model_digest)}.png"


def is_made(image: ClassImage, path: Path) -> bool:
    """Tell whether a file is there, whole, and says that it is this image."""
    if not path.is_file():
        return False
    try:
        with Image.open(io.BytesIO(read_file(path))) as picture:
            said = json.loads(picture.info.get(TEXT, "null"))
            is_it = said == asdict(image) and picture.size == (image.width, image.height)
            picture.verify()
    except (OSError, SyntaxError, ValueError) as error:
        logger.warning("class image %s is broken and made again: %s", path, error)
        return False
    return is_it


def _alike(image: ClassImage) -> tuple[int, int, str, int, float]:
    return image.width, image.height, image.sampler, image.steps, image.guidance


def _write(path: Path, image: ClassImage, picture: Image.Image) -> None:
    info = PngInfo()
    info.add_itxt("parameters", parameters(image.as_prompt()))
    info.add_itxt(TEXT, json.dumps(asdict(image), ensure_ascii=False))
    with open_replacing(path) as stream:
        picture.save(stream, "PNG", pnginfo=info)
