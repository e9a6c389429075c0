"""Enlarge pictures with an ONNX network of the user's, such as R-ESRGAN 4x+ Anime6B, in tiles.

The network takes (1, 3, H, W) RGB from 0 to 1, as float32 or float16, and returns the same picture s times as large,
s whatever it is. H and W may be fixed in the file. Each tile is brought down to the asked factor by Lanczos at once,
so that memory does not grow with s. No network comes with this project.
"""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from training.dreambooth.doctor.onnx_file import open_onnx

TILE = 256
"""Pixels of a tile's side, its overlap with others included, when the file does not say."""
OVERLAP = 16
"""Pixels that a tile sees of its neighbours on each side."""


class Upscaler:
    """An opened network. sha256: of its file."""

    def __init__(self, path: Path) -> None:
        """Open a file. Raises FileNotFoundError, ValueError when it is no network from pictures to pictures."""
        self._session = open_onnx(path)
        inputs = self._session.get_inputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 4:
            shapes = ", ".join(str(one.shape) for one in inputs)
            raise ValueError(f"{path}: takes {shapes}; an upscaler takes one picture, (1, 3, height, width)")
        self._path = path
        self._name = inputs[0].name
        self._dtype = np.float16 if inputs[0].type == "tensor(float16)" else np.float32
        fixed = [side for side in inputs[0].shape[2:] if isinstance(side, int)]
        self._tile = min(fixed, default=TILE)
        if self._tile <= 2 * OVERLAP:
            raise ValueError(f"{path}: takes tiles of {self._tile} pixels; at least {2 * OVERLAP + 1} are needed")
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()

    def enlarge(self, image: Image.Image, factor: float) -> Image.Image:
        """Return an RGB picture `factor` times as large; 1 keeps the size, but cleans it."""
        result = Image.new("RGB", (round(image.width * factor), round(image.height * factor)))
        padded = np.pad(np.asarray(image), [(OVERLAP, self._tile), (OVERLAP, self._tile), (0, 0)], mode="edge")
        inner = self._tile - 2 * OVERLAP
        across, down = image.width / result.width, image.height / result.height
        for left, right in _spans(result.width, inner * factor):
            for top, bottom in _spans(result.height, inner * factor):
                x, y = math.floor(left * across), math.floor(top * down)
                tile = self._run(padded[y : y + self._tile, x : x + self._tile])
                scale = tile.width / self._tile
                box = (
                    (left * across - x + OVERLAP) * scale,
                    (top * down - y + OVERLAP) * scale,
                    (right * across - x + OVERLAP) * scale,
                    (bottom * down - y + OVERLAP) * scale,
                )
                piece = tile.resize((right - left, bottom - top), Image.Resampling.LANCZOS, box=box)
                result.paste(piece, (left, top))
        return result

    def _run(self, pixels: npt.NDArray[np.uint8]) -> Image.Image:
        planes = (pixels.astype(np.float32) / 255).astype(self._dtype).transpose(2, 0, 1)[None]
        (output,) = self._session.run(None, {self._name: np.ascontiguousarray(planes)})
        is_picture = output.ndim == 4 and output.shape[1] == 3 and output.shape[2] == output.shape[3]
        if not is_picture or output.shape[2] < self._tile:
            raise ValueError(
                f"{self._path}: made {output.shape} of {planes.shape}; an upscaler returns (1, 3, H·s, W·s)"
            )
        levels = np.nan_to_num(output[0].astype(np.float32)).clip(0, 1).transpose(1, 2, 0) * 255
        return Image.fromarray(levels.round().astype(np.uint8))


def _spans(length: int, step: float) -> Iterator[tuple[int, int]]:
    """Cut 0 to `length` into even pieces of at most `step`, at least 1."""
    pieces = math.ceil(length / max(math.floor(step) - 1, 1))
    for number in range(pieces):
        yield number * length // pieces, (number + 1) * length // pieces
