"""The previews of a run over time: which there are, their prompts, and small copies of them. Writes no file."""

import io
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from training.preview import read_pictures
from training.run_dir import RunDir

_CACHED_BYTES = 64 << 20
_MAX_TEXT = 2000


@dataclass(frozen=True)
class PreviewStep:
    """The pictures drawn at one step. pictures: prompt number → file."""

    global_step: int
    chunk: str
    pictures: dict[str, Path]


class Previews:
    """Of one run. Safe to use from several threads."""

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir
        self._facts: dict[Path, tuple[str, int, int]] = {}
        self._small: OrderedDict[tuple[Path, int, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def steps(self, chunks: Sequence[str]) -> list[PreviewStep]:
        """Return what was drawn in these chunks, by global step."""
        found = []
        for chunk in chunks:
            for step, named in read_pictures(self._run_dir.previews_folder(chunk)).items():
                pictures = {name.partition("/")[2]: path for name, path in named.items()}
                found.append(PreviewStep(step, chunk, {n: path for n, path in pictures.items() if n != "strip"}))
        return sorted((step for step in found if step.pictures), key=lambda step: step.global_step)

    def listing(self, chunks: Sequence[str]) -> dict[str, Any]:
        """Return all previews as the page takes them: `texts`, and `steps` whose pictures point into them.

        A picture's `path` is what `file` takes.
        """
        texts: dict[str, int] = {}
        steps = []
        for step in self.steps(chunks):
            pictures = {}
            for number, path in step.pictures.items():
                text, width, height = self._read(path)
                place = texts.setdefault(text, len(texts))
                shown = {"path": f"{step.chunk}/{path.name}", "text": place, "width": width, "height": height}
                pictures[number] = shown
            steps.append({"step": step.global_step, "chunk": step.chunk, "pictures": pictures})
        return {"texts": list(texts), "steps": steps}

    def _read(self, path: Path) -> tuple[str, int, int]:
        """Return a picture's `parameters` ("" without), width and height. A picture is never changed."""
        if path not in self._facts:
            try:
                with Image.open(path) as picture:
                    text = str(picture.info.get("parameters", ""))[:_MAX_TEXT]
                    self._facts[path] = text, picture.width, picture.height
            except OSError:
                return "", 1, 1  # rolled back meanwhile: it is gone from the next listing
        return self._facts[path]

    def file(self, path: str, chunks: Sequence[str]) -> Path | None:
        """Return the file of a listed picture; None for anything else. chunks: all that the run has started."""
        chunk, _, name = path.rpartition("/")
        if chunk not in chunks:
            return None
        folder = self._run_dir.previews_folder(chunk)
        return next(
            (file for named in read_pictures(folder).values() for file in named.values() if file.name == name), None
        )

    def small(self, file: Path, *, height: int) -> bytes:
        """Return a copy of a picture, at most `height` pixels high, as WebP. Raises OSError when it cannot be read."""
        key = (file, file.stat().st_mtime_ns, height)
        with self._lock:
            if key in self._small:
                self._small.move_to_end(key)
                return self._small[key]
        with Image.open(file) as picture:
            scale = min(height / picture.height, 1.0)
            size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
            stream = io.BytesIO()
            picture.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(stream, "WEBP", quality=82, method=2)
        data = stream.getvalue()
        with self._lock:
            self._small[key] = data
            while sum(map(len, self._small.values())) > _CACHED_BYTES:
                self._small.popitem(last=False)
        return data
