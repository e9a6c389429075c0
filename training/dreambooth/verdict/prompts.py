"""The sanity prompt as a preview, and which concept a preview shows. No torch."""

import re
from collections.abc import Mapping, Sequence

from training.config import Prompt, RunConfig
from training.config.concepts import FILEWORDS, ConceptConfig
from training.dreambooth.concept_prompts import concept_prompts, read_concepts

_GUIDANCE = 7.5


def sanity_prompt(config: RunConfig, previews: Sequence[Prompt]) -> Prompt | None:
    """Return the sanity prompt with the sampler, steps, guidance and size of the first preview; None without one.

    A run without previews draws it at the size of its buckets, at guidance 7.5.
    """
    recipe = config.dreambooth
    if recipe is None or not recipe.sanity_prompt:
        return None
    width, height = config.buckets.resolution
    usual = next(iter(previews), None)
    if usual is None:
        usual = Prompt(text="", width=width, height=height, guidance=_GUIDANCE)
    own = {"text": recipe.sanity_prompt, "negative": recipe.sanity_negative, "seed": recipe.sanity_seed}
    return usual.model_copy(update=own)


def shown_concepts(prompts: Sequence[Prompt], names: Sequence[str], config: RunConfig) -> tuple[str | None, ...]:
    """Return of each preview the concept that it shows, if any: its own, or one of `names` that its text names.

    prompts: as `preview_prompts` gives them: those that concepts ask for come last.
    """
    own = [wanted.concept for wanted in concept_prompts(config) for _ in wanted.prompts]
    words = concept_words(names, read_concepts(config))
    return (*(shown_concept(prompt.text, words) for prompt in prompts[: len(prompts) - len(own)]), *own)


def concept_words(names: Sequence[str], concepts: Sequence[ConceptConfig]) -> dict[str, tuple[str, ...]]:
    """Return of each concept the words that name it in a prompt: its token, its prompt if that is fixed, its name."""
    words = {name: {name, name.replace("_", " ").replace("-", " ")} for name in names}
    for concept in concepts:
        if concept.name in words:
            fixed = concept.prompt if FILEWORDS not in concept.prompt else ""
            words[concept.name] |= {word.strip() for word in (concept.token, fixed) if word.strip()}
    return {name: tuple(sorted(found, key=len, reverse=True)) for name, found in words.items()}


def shown_concept(text: str, words: Mapping[str, Sequence[str]]) -> str | None:
    """Return the concept that a prompt names, as whole words; of several the one with the longest; None for none."""
    found = [
        (len(word), name)
        for name, own in words.items()
        for word in own
        if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE)
    ]
    longest = max((length for length, _ in found), default=0)
    names = sorted({name for length, name in found if length == longest})
    return names[0] if len(names) == 1 else None
