"""Kinds of models that `annotate` can run: one line per plug-in, here and in the union of their settings."""

from typing import Annotated

from pydantic import Field

from captioning.plugin import Plugin
from captioning.scorers import aes_b32, aesthetic_shadow, date
from captioning.taggers import wd

PLUGINS: dict[str, Plugin] = {
    "wd_tagger": wd,
    "aesthetic_shadow": aesthetic_shadow,
    "aes_b32": aes_b32,
    "date": date,
}

ModelConfig = Annotated[
    wd.WdTaggerConfig | aesthetic_shadow.AestheticShadowConfig | aes_b32.AesB32Config | date.DateConfig,
    Field(discriminator="kind"),
]
