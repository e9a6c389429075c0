"""Load a component from a folder or a hub id, whichever of a pipeline and a model's own repository it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from training.weight_files import locate_component

Loaded = TypeVar("Loaded")


def load_component(
    load: Callable[..., Loaded], path_or_id: str | Path, component: str, *, file_name: str, **options: Any
) -> Loaded:
    """Call a `from_pretrained` for what `weight_files.locate_component` gives.

    A hub id whose repository has no subfolder of the component's name is taken for the component itself:
    `stabilityai/stable-cascade-prior` has a `tokenizer/`, `laion/CLIP-ViT-bigG-14-laion2B-39B-b160k` is one.

    Raises FileNotFoundError for a path that is nothing of this, OSError where `from_pretrained` does.
    """
    source, subfolder = locate_component(path_or_id, component, file_name=file_name)
    try:
        return load(source, subfolder=subfolder, **options)
    except OSError as error:
        if subfolder != component:
            raise
        try:
            return load(source, subfolder="", **options)
        except OSError:
            raise error from None
