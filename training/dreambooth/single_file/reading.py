"""Open a single file of any age: CLIP-L's tensors have the names of today, whatever wrote the file."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from training.dreambooth.single_file.layout import TEXT_PREFIXES
from training.weight_files import OpenWeights, open_weights

_CLIP_L = "|".join(re.escape(TEXT_PREFIXES[family][0][0]) for family in ("sd1", "sdxl"))
_WITHOUT_MIDDLE = re.compile(rf"({_CLIP_L})((?:embeddings|encoder|final_layer_norm)\..+)")
"""As in NovelAI's file and what was merged from it: written before transformers put `text_model.` there."""


@contextmanager
def open_single_file(path: Path) -> Iterator[OpenWeights]:
    """Open a file as `open_weights` does, CLIP-L's names with `text_model.` in them. Raises what that raises."""
    with open_weights(path) as file:
        names = {_of_today(key): key for key in file.shapes}
        yield replace(
            file,
            shapes={name: file.shapes[key] for name, key in names.items()},
            tensor=lambda name: file.tensor(names[name]),
        )


def _of_today(key: str) -> str:
    found = _WITHOUT_MIDDLE.fullmatch(key)
    return f"{found[1]}text_model.{found[2]}" if found else key
