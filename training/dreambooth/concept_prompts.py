"""The previews that concepts ask for in their `sample` tables. No torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sharding.config import ConfigError, load_config
from training.config import Prompt, RunConfig
from training.config.concepts import ConceptConfig, ConceptsFile, SampleConfig

SAMPLER = "ddim"
"""The wiki names Euler A and DDIM; the second adds no noise of its own, so that pictures of two states differ less."""


@dataclass(frozen=True)
class ConceptPrompts:
    """Previews of one concept, perhaps with `[filewords]` in them."""

    concept: str
    prompts: tuple[Prompt, ...]


def read_concepts(config: RunConfig) -> tuple[ConceptConfig, ...]:
    """Return the concepts of a run; none where it trains other chunks. Raises ConfigError, FileNotFoundError."""
    recipe = config.dreambooth
    if recipe is None or recipe.concepts is None:
        return ()
    return load_config(recipe.concepts, ConceptsFile, []).concepts


def concept_prompts(config: RunConfig) -> tuple[ConceptPrompts, ...]:
    """Return the previews of each concept that asks for some, in the size that is trained.

    Raises ConfigError for a template without a line, FileNotFoundError for one that is not there.
    """
    found = [ConceptPrompts(concept.name, tuple(_prompts(concept, config))) for concept in read_concepts(config)]
    return tuple(one for one in found if one.prompts)


def _prompts(concept: ConceptConfig, config: RunConfig) -> Iterator[Prompt]:
    sample = concept.sample
    texts = _texts(sample, concept.name)
    width, height = config.buckets.resolution
    first = config.seed if sample.seed < 0 else sample.seed
    for number in range(sample.images if texts else 0):
        yield Prompt(
            text=texts[number % len(texts)], negative=sample.negative, width=width, height=height,
            seed=first + number // len(texts), steps=sample.steps, guidance=sample.guidance, sampler=SAMPLER,
        )  # fmt: skip


def _texts(sample: SampleConfig, concept: str) -> list[str]:
    """Return the prompts to draw; a template's lines stand in place of the prompt."""
    if not sample.template:
        return [sample.prompt] if sample.prompt else []
    lines = [line.strip() for line in Path(sample.template).read_text(encoding="utf-8").splitlines()]
    if not any(lines):
        raise ConfigError(f"concept {concept}: sample.template {sample.template} has no line; write a prompt into it")
    return [line for line in lines if line]
