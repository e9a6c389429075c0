"""What looks at images, and how their pixels are collected into batches for it.

A viewer is an image model, a captioner, or a backbone with the heads that stand on it. A batch is filled in the order
of the part, and the last one is filled up, so that every call has one shape.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from captioning.part_work import ModelWork
from captioning.plugin import Backbone, Captioner, HeadModel, ImageModel, Pixels, Row


@dataclass(frozen=True)
class Viewer:
    """What sees images, and the models that speak of them: an image model for itself, or the heads of a backbone."""

    eye: ImageModel | Captioner | Backbone
    models: tuple[str, ...]
    heads: Mapping[str, HeadModel] = field(default_factory=dict)
    """By model; empty for an image model."""

    def look(
        self, pixels: Sequence[npt.NDArray[Any]], prompts: Sequence[str], keys: Sequence[str]
    ) -> dict[str, list[Row]]:
        """Return the rows of each model; prompts and keys: for captioners, otherwise not read."""
        if isinstance(self.eye, Captioner):
            return {self.models[0]: self.eye.describe(pixels, prompts, keys)}
        batch = np.stack(pixels)
        if isinstance(self.eye, ImageModel):
            return {self.models[0]: self.eye.predict(batch)}
        features = self.eye.embed(batch)
        return {name: head.score(features) for name, head in self.heads.items()}


BatchSizeOf = Callable[[Viewer, Pixels, str], int]
"""Viewer, and an image with what is asked about it to try with → batch size."""


class Batcher:
    """Collects what one viewer is to see of one part, and asks it a full batch at a time.

    A captioner whose hints come from a tagger waits until the tagger has answered for the whole batch, which is at
    most the tagger's own batch later; so `finish` the batchers of others first.
    """

    def __init__(
        self,
        viewer: Viewer,
        works: Mapping[str, ModelWork],
        *,
        keys: Sequence[str],
        batch_size_of: BatchSizeOf,
    ) -> None:
        self.viewer = viewer
        self._works = works
        self._prompts = works[viewer.models[0]].prompts
        self._keys = keys
        self._batch_size_of = batch_size_of
        self._places: list[int] = []
        self._pixels: list[npt.NDArray[Any]] = []
        self._answers: dict[str, list[Row]] = {name: [] for name in viewer.models}

    @property
    def waits_for_others(self) -> bool:
        return self._prompts is not None

    def add(self, place: int, pixels: npt.NDArray[Any]) -> None:
        """Take an image; ask the viewer when a batch is full."""
        self._places.append(place)
        self._pixels.append(pixels)
        self._ask()

    def finish(self) -> dict[str, list[Row]]:
        """Ask for the rest and return all new answers of the part by model."""
        self._ask(is_last=True)
        return self._answers

    def _ask(self, *, is_last: bool = False) -> None:
        while self._places and (first := self._prompt(self._places[0])) is not None:
            size = self._batch_size_of(self.viewer, self._pixels[0], first)
            prompts = [self._prompt(place) for place in self._places[:size]]
            known = [prompt for prompt in prompts if prompt is not None]
            if len(known) < len(prompts) or (len(prompts) < size and not is_last):
                return
            self._look(size, known)

    def _prompt(self, place: int) -> str | None:
        return self._prompts.text(place) if self._prompts else ""

    def _look(self, size: int, prompts: list[str]) -> None:
        """Ask about the first `size` images; a short batch is filled up with its last image."""
        places, pixels = self._places[:size], self._pixels[:size]
        self._places, self._pixels = self._places[size:], self._pixels[size:]
        missing = size - len(places)
        keys = [self._keys[place] for place in places]
        seen = self.viewer.look(
            pixels + missing * pixels[-1:], prompts + missing * prompts[-1:], keys + missing * keys[-1:]
        )
        for name, answers in seen.items():
            rows = self._works[name].rows
            for place, row in zip(places, answers, strict=False):
                if rows[place] is None:  # a head may have its row of an image that another one lacks
                    rows[place] = row
                    self._answers[name].append(row)
