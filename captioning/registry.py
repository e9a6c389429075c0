"""Kinds of models that `annotate` can run: one line per plug-in."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny

from captioning.captioners import hf
from captioning.plugin import ModelSettings, Plugin
from captioning.scorers import (
    aes_b32,
    aesthetic_shadow,
    anime_aesthetic,
    clip_nsfw,
    date,
    laion_aesthetic,
    measure,
    open_nsfw,
    style_age,
    waifu_scorer,
)
from captioning.taggers import channel_first, deepdanbooru, wd

PLUGINS: dict[str, Plugin] = {
    "wd_tagger": wd,
    "channel_first_tagger": channel_first,
    "deepdanbooru": deepdanbooru,
    "aesthetic_shadow": aesthetic_shadow,
    "aes_b32": aes_b32,
    "laion_aesthetic": laion_aesthetic,
    "waifu_scorer": waifu_scorer,
    "anime_aesthetic": anime_aesthetic,
    "style_age": style_age,
    "clip_nsfw": clip_nsfw,
    "open_nsfw": open_nsfw,
    "measure": measure,
    "date": date,
    "captioner": hf,
}


def _settings(value: Any) -> Any:
    """Validate a model's table with the settings of its kind."""
    if not isinstance(value, Mapping):
        return value
    kind = value.get("kind")
    if kind not in PLUGINS:
        raise ValueError(f"kind {kind!r}: unknown; known: {', '.join(PLUGINS)}")
    return PLUGINS[kind].Settings.model_validate(value)


ModelConfig = Annotated[SerializeAsAny[ModelSettings], BeforeValidator(_settings)]
"""A model's table of the config: an instance of its plug-in's `Settings`."""
