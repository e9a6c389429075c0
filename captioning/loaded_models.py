"""The models of a config on one device: who they are; loaded when the first part needs them."""

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from captioning.annotate_report import Tally
from captioning.batch_size import (
    ON_CPU,
    find_batch_size,
    remember_batch_size,
    remembered_batch_size,
)
from captioning.config import AnnotateConfig
from captioning.devices import split_device
from captioning.part_work import PartWork
from captioning.plugin import (
    FULL_SIZE,
    Backbone,
    BackboneSpec,
    Captioner,
    HeadModel,
    Identity,
    ImageModel,
    Model,
    ModelError,
    Pixels,
)
from captioning.registry import PLUGINS
from captioning.taggers.base import TaggerSettings
from captioning.viewers import Viewer
from sharding.config import ConfigError
from sharding.schema import Workspace

logger = logging.getLogger(__name__)

_one_at_a_time = threading.Lock()
"""Held while a model is loaded: transformers is made quiet by settings of its whole module."""


class LoadedModels:
    """Models on one device. identities: of all that may be needed; nothing is loaded at first."""

    def __init__(
        self,
        config: AnnotateConfig,
        identities: Mapping[str, Identity],
        *,
        device: str,
        workspace: Workspace,
        tally: Tally,
    ) -> None:
        self._config = config
        self._identities = identities
        self._device = device
        self._workspace = workspace
        self._tally = tally
        self._loaded: dict[str, Model] = {}
        self._backbones: dict[BackboneSpec, Backbone] = {}
        self._batch_sizes: dict[int, int] = {}

    def load(self, name: str) -> Model:
        """Return the model, loaded the first time. Raises ModelError."""
        if name not in self._loaded:
            settings = self._config.models[name]
            who = self._identities[name]
            licence = f"licence {who.licence}" if who.licence else "its table names no licence"
            logger.info("loading %s on %s: %s, %s, %s", name, self._device, who.model, who.revision, licence)
            with self._tally.loading(), _one_at_a_time, _naming(name):
                self._loaded[name] = PLUGINS[settings.kind].load(settings, device=self._device)
        return self._loaded[name]

    def viewers(self, work: PartWork) -> dict[str, Viewer]:
        """Return what has to see images of the part, by the first of the models that it serves."""
        heads: dict[BackboneSpec, dict[str, HeadModel]] = {}
        viewers: dict[str, Viewer] = {}
        for name in work.looking:
            model = self.load(name)
            if isinstance(model, HeadModel):
                heads.setdefault(model.backbone, {})[name] = model
            else:
                assert isinstance(model, ImageModel | Captioner), name
                viewers[name] = Viewer(model, (name,))
        for spec, of_spec in heads.items():
            first = next(iter(of_spec))
            viewers[first] = Viewer(self._backbone(first, spec), tuple(of_spec), of_spec)
        for name, viewer in viewers.items():
            self._check_min_side(name, viewer)
        return viewers

    def batch_size_of(self, viewer: Viewer, pixels: Pixels, prompt: str) -> int:
        """Return the viewer's batch size: its file's, the config's, or one found by trial with this image."""
        given = viewer.eye.batch_size or self._config.batch_size
        if isinstance(given, int):
            return given
        if given is None and self._device == "cpu":
            return ON_CPU
        if id(viewer.eye) not in self._batch_sizes:
            with self._tally.loading():
                self._batch_sizes[id(viewer.eye)] = self._try(viewer, pixels, prompt)
        return self._batch_sizes[id(viewer.eye)]

    def _try(self, viewer: Viewer, pixels: Pixels, prompt: str) -> int:
        name = viewer.models[0]
        folder = self._workspace.annotations(name)
        made_with = f"{self._identities[name].digest} {split_device(self._device)[0]}"
        found = remembered_batch_size(folder, made_with=made_with)
        if found is None:
            found = find_batch_size(lambda n: viewer.look([pixels] * n, [prompt] * n, [""] * n), name=name)
            remember_batch_size(folder, found, made_with=made_with)
        return found

    def _backbone(self, name: str, spec: BackboneSpec) -> Backbone:
        if spec not in self._backbones:
            with self._tally.loading(), _one_at_a_time, _naming(name):
                self._backbones[spec] = spec.load(device=self._device)
        return self._backbones[spec]

    def _check_min_side(self, name: str, viewer: Viewer) -> None:
        min_side, needed = self._config.min_side, viewer.eye.preparer.min_side
        if min_side is None or min_side >= needed:
            return
        if needed == FULL_SIZE:
            raise ConfigError(f"annotate.min_side: {name!r} measures the file's own pixels; leave min_side out")
        raise ConfigError(f"annotate.min_side: {min_side} is below the {needed} pixels that {name!r} looks at")


def identify(name: str, config: AnnotateConfig) -> Identity:
    """Return who a model of the config is; its hints' tagger is part of it. Raises ModelError, ConfigError."""
    settings = config.models[name]
    with _naming(name):
        identity = PLUGINS[settings.kind].identify(settings)
    if identity.prompt is not None and (tagger := identity.prompt.tagger):
        taggers = [other for other, it in config.models.items() if isinstance(it, TaggerSettings)]
        if tagger not in taggers:
            known = ", ".join(["record", *taggers])
            raise ConfigError(
                f"annotate.models.{name}.hints: {tagger!r} is no tagger of annotate.models; known: {known}"
            )
        identity = replace(identity, settings={**identity.settings, "hints": identify(tagger, config).digest})
    if config.min_side is None or not identity.needs_image:
        return identity
    return replace(identity, preprocessing=f"{identity.preprocessing} min_side {config.min_side}")


@contextmanager
def _naming(model: str) -> Iterator[None]:
    """Make an error of a plug-in say which table of the config it is about."""
    try:
        yield
    except ModelError as error:
        error.args = (f"annotate.models.{model}: {error}",)
        raise
