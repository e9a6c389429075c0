"""Captioning's two tables of a dataset.toml: the models that annotate, and the policies that make captions.

`annotate` says which models look at each image and stores raw numbers; `policies` turn numbers and tags into words.
Changing a policy never runs a model.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from captioning.captioners.hf import Settings as CaptionerSettings
from captioning.devices import DeviceName
from captioning.policy import PolicyConfig
from captioning.registry import ModelConfig
from captioning.taggers.base import TaggerSettings
from sharding.config import Config, DatasetConfig, Name

BatchSize = Annotated[int, Field(gt=0)]


class AnnotateConfig(Config):
    """What looks at each image, and on which device."""

    device: DeviceName = "cpu"
    """Where the models run: cpu, cuda, rocm, migraphx, openvino or xpu (both Intel), the second GPU as cuda:1. A device
    that is not there is an error."""
    batch_size: BatchSize | Literal["auto"] | None = None
    """Images per call of a model; the last batch of a part is filled up, so rows do not depend on its length. "auto":
    found by trial for each model, doubling until memory is full or nothing is gained. Without a value 4 on a CPU and
    "auto" elsewhere."""
    workers: int | None = Field(None, ge=0)
    """Decode processes; 0 decodes in a thread of the main process; without a value one per core."""
    min_side: int | None = Field(None, gt=0)
    """If given, JPEGs are decoded at the smallest DCT scale (1/2, 1/4, 1/8) that leaves this many pixels to the
    shorter side. Several times faster with camera-size pictures; scores move a little. Without a value every pixel is
    decoded, as the authors of the models do."""
    models: dict[Name, ModelConfig] = Field(default_factory=dict)
    """By name; annotations/<name>/ holds what each one said. `kind` selects the plug-in."""


class CaptioningConfig(DatasetConfig):
    """A dataset.toml with captioning's tables checked."""

    annotate: AnnotateConfig = AnnotateConfig()  # type: ignore[assignment]
    """Models that look at each image."""
    policies: dict[Name, PolicyConfig] = Field(default_factory=dict)  # type: ignore[assignment]
    """What turns raw numbers into captions, by name; `pack.policy` names the one that goes into chunks."""

    @model_validator(mode="after")
    def _names_refer_to_something(self) -> "CaptioningConfig":
        models = self.annotate.models
        taggers = {name: it for name, it in models.items() if isinstance(it, TaggerSettings)}
        captioners = [name for name, it in models.items() if isinstance(it, CaptionerSettings)]
        scorers = [name for name in models if name not in (*taggers, *captioners)]
        for name, policy in self.policies.items():
            where = f"policies.{name}"
            for key, model in policy.scorers.items():
                if model not in scorers:
                    raise ValueError(f"{where}.{key}: {model!r} is no scorer of annotate.models: {', '.join(scorers)}")
            if policy.tags.tagger:
                tagger = taggers.get(policy.tags.tagger)
                if tagger is None:
                    raise ValueError(
                        f"{where}.tags.tagger: {policy.tags.tagger!r} is no tagger of annotate.models: "
                        f"{', '.join(taggers)}"
                    )
                if min(policy.tags.general_threshold, policy.tags.character_threshold) < tagger.floor:
                    raise ValueError(
                        f"{where}.tags: a threshold is below annotate.models.{policy.tags.tagger}.floor = "
                        f"{tagger.floor}; lower probabilities are not stored"
                    )
            captioner = policy.sentences.captioner
            if captioner and captioner not in captioners:
                known = ", ".join(captioners) or "it has none"
                raise ValueError(
                    f"{where}.sentences.captioner: {captioner!r} is no captioner of annotate.models: {known}"
                )
            named = {"custom": policy.custom, "date.sources": policy.date.sources, "characters": policy.characters}
            named |= {"tags.source_blacklist": policy.tags.source_blacklist}
            for key, sources in named.items():
                if unknown := [source for source in sources if source not in self.sources]:
                    raise ValueError(f"{where}.{key}: unknown source {unknown[0]!r}; known: {', '.join(self.sources)}")
        if self.policies and self.pack.policy not in self.policies:
            raise ValueError(f"pack.policy: {self.pack.policy!r} is none of {', '.join(self.policies)}")
        return self
