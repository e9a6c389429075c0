"""Our limit on pixels in the place of Pillow's, which is one number for a whole process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image


class _PillowLimit:
    """Pillow's limit on pixels, a global of its module, is ours while one of our calls runs.

    Beyond twice its value Pillow refuses, in places before any where we could. Of several calls at once, in threads,
    the most generous limit holds; each checks its own once the header is read.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: list[int] = []
        self._before: int | None = None

    @contextmanager
    def set_to(self, max_pixels: int) -> Iterator[None]:
        with self._lock:
            if not self._asked:
                self._before = Image.MAX_IMAGE_PIXELS
            self._asked.append(max_pixels)
            Image.MAX_IMAGE_PIXELS = -(-max(self._asked) // 2)
        try:
            yield
        finally:
            with self._lock:
                self._asked.remove(max_pixels)
                Image.MAX_IMAGE_PIXELS = -(-max(self._asked) // 2) if self._asked else self._before


pillow_limit = _PillowLimit()
