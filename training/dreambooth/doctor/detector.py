"""Who is in a picture, by a detector of the user's: an ONNX file, or a function of a Python file. None comes with us.

`detector.py:detect` (or `detector.py`, which means that) names a function that takes an RGB `PIL.Image` and returns
boxes as (label, left, top, right, bottom[, score]) in pixels, with the labels "person" and "face".

An ONNX file takes (1, 3, H, W) RGB from 0 to 1 and returns (1, 4 + classes, N), or (1, N, 4 + classes), as YOLOv8 and
its like do: centre x, centre y, width and height in pixels of its input, then a score for each class.
"""

import ast
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from training.dreambooth.doctor.boxes import Box
from training.dreambooth.doctor.onnx_file import open_onnx
from training.dreambooth.doctor.rules import DetectorRules

Detector = Callable[[Image.Image], Sequence[Box]]

_FUNCTION = "detect"
_SIDE = 640  # pixels, when the file takes any
_GREY = (114, 114, 114)  # what these networks are trained to see around a picture


def load_detector(name: str, rules: DetectorRules) -> Detector:
    """Return a detector by `FILE.onnx`, `FILE.py` or `FILE.py:FUNCTION`. Raises FileNotFoundError, ValueError."""
    if name.endswith(".onnx"):
        return _OnnxDetector(Path(name), rules)
    file, _, function = name.rpartition(":") if ".py:" in name else (name, "", _FUNCTION)
    if not file.endswith(".py"):
        raise ValueError(f"--detector {name}: give FILE.onnx, FILE.py or FILE.py:FUNCTION")
    return _of_python(Path(file), function)


def _of_python(path: Path, function: str) -> Detector:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file with a detector")
    spec = importlib.util.spec_from_file_location(f"detector_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path}: cannot be loaded as Python")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    detect = getattr(module, function, None)
    if not callable(detect):
        raise ValueError(f"{path}: has no function {function!r}")

    def boxes(image: Image.Image) -> list[Box]:
        return [_box(found, image.size, f"{path}:{function}") for found in detect(image)]

    return boxes


def _box(found: Any, size: tuple[int, int], name: str) -> Box:
    try:
        label, left, top, right, bottom, *score = found
        sides = [float(side) / whole for side, whole in zip((left, top, right, bottom), (*size, *size), strict=True)]
        return _clipped(str(label), sides, float(score[0]) if score else 1.0)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name}: returned {found!r}; a box is (label, left, top, right, bottom) or with a score behind"
        ) from error


def _clipped(label: str, sides: Sequence[float], score: float) -> Box:
    left, top, right, bottom = (min(max(float(side), 0.0), 1.0) for side in sides)
    return Box(label, left, top, right, bottom, score)


class _OnnxDetector:
    def __init__(self, path: Path, rules: DetectorRules) -> None:
        self._session = open_onnx(path)
        self._path, self._rules = path, rules
        self._input = self._session.get_inputs()[0]
        shape = self._input.shape
        if len(shape) != 4 or (isinstance(shape[1], int) and shape[1] != 3):
            raise ValueError(f"{path}: takes {shape}; a detector takes (1, 3, height, width)")
        width, height = (side if isinstance(side, int) else _SIDE for side in (shape[3], shape[2]))
        self._size = (width, height)
        written = self._session.get_modelmeta().custom_metadata_map.get("names", "")
        self._labels = _names(written) or rules.labels

    def __call__(self, image: Image.Image) -> list[Box]:
        width, height = self._size
        scale = min(width / image.width, height / image.height)
        fitted = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        canvas = Image.new("RGB", self._size, _GREY)
        canvas.paste(fitted, (0, 0))
        planes = (np.asarray(canvas, np.float32) / 255).transpose(2, 0, 1)[None]
        rows = self._rows(self._session.run(None, {self._input.name: planes})[0])
        return _without_doubles(self._boxes(rows, fitted.size), self._rules.overlap)

    def _rows(self, output: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        wanted = 4 + len(self._labels)
        if output.ndim == 3 and output.shape[2] == wanted:
            return np.asarray(output[0])
        if output.ndim == 3 and output.shape[1] == wanted:
            return np.asarray(output[0].T)
        raise ValueError(
            f"{self._path}: returned {output.shape}; with {len(self._labels)} labels (1, {wanted}, N) is "
            "expected: set detector.labels to its classes, in order"
        )

    def _boxes(self, rows: npt.NDArray[np.floating], size: tuple[int, int]) -> list[Box]:
        boxes = []
        for x, y, width, height, *scores in rows[rows[:, 4:].max(axis=1) >= self._rules.score].tolist():
            best = int(np.argmax(scores))
            label = self._rules.renamed.get(self._labels[best], self._labels[best])
            sides = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            shares = [side / whole for side, whole in zip(sides, (*size, *size), strict=True)]
            boxes.append(_clipped(label, shares, scores[best]))
        return boxes


def _names(written: str) -> tuple[str, ...]:
    """Read "{0: 'face', 1: 'person'}", as exporters leave it in the file."""
    try:
        names = ast.literal_eval(written)
    except (ValueError, SyntaxError):
        return ()
    return tuple(str(names[key]).lower() for key in sorted(names)) if isinstance(names, dict) else ()


def _without_doubles(boxes: Sequence[Box], overlap: float) -> list[Box]:
    kept: list[Box] = []
    for box in sorted(boxes, key=lambda one: -one.score):
        shared = [(one.shared(box), one) for one in kept if one.label == box.label]
        if all(both <= overlap * (one.area + box.area - both) for both, one in shared):
            kept.append(box)
    return kept
