"""Kinds of models that `annotate` can run: one line per plug-in."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny

from captioning.plugin import ModelSettings, Plugin
from captioning.scorers import aes_b32, aesthetic_shadow, date
from captioning.taggers import wd

PLUGINS: dict[str, Plugin] = {
    "wd_tagger": wd,
    "aesthetic_shadow": aesthetic_shadow,
    "aes_b32": aes_b32,
    "date": date,
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
