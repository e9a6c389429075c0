"""Stages of a run: chunks with settings of their own. What a chunk is trained with, as an ordinary RunConfig. No torch.

A stage is a chunk: it is saved, resumed and told like any other. What differs between stages (epochs, rates, trained
parts, the weight of class images) stands in the config of its chunk, and nothing else knows of stages.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sharding.chunk import ChunkError
from training.config import RunConfig
from training.config.dreambooth import DreamBoothConfig, StageConfig

CONCEPTS = "concepts"
"""The dataset whose chunks are packed concepts."""
WITH_TEXT, WITHOUT_TEXT = "with-text", "without-text"
"""Names of the two halves that `text_encoder_ratio` makes of a run."""


@dataclass(frozen=True)
class Stage:
    """One stage, with all its values. chunk: what it trains; concepts: their names, all when empty."""

    chunk: str
    epochs: int
    concepts: tuple[str, ...]
    values: StageConfig


def stages_of(config: RunConfig) -> tuple[Stage, ...]:
    """Return the stages of a run on packed concepts, in order; of any other run none.

    A text_encoder_ratio between 0 and 1 makes two: the first round(epochs × ratio) epochs, and the rest.
    """
    recipe = config.dreambooth
    if recipe is None or recipe.concepts is None:
        return ()
    tables = recipe.stages or _halves(recipe, config.data.epochs)
    return tuple(
        Stage(f"{CONCEPTS}/{number:02d}-{table.name}", table.epochs, table.concepts, table)
        for number, table in enumerate(tables, 1)
    )


def _halves(recipe: DreamBoothConfig, epochs: int) -> tuple[StageConfig, ...]:
    with_text = recipe.epochs_with_text(epochs)
    if with_text in (0, epochs):
        return (StageConfig(name="all", epochs=epochs),)
    rest = tuple(part for part in recipe.train if part == "unet")
    return (
        StageConfig(name=WITH_TEXT, epochs=with_text),
        StageConfig(name=WITHOUT_TEXT, epochs=epochs - with_text, train=rest),
    )


def stage_config(config: RunConfig, chunk: str) -> RunConfig:
    """Return the settings that a chunk is trained with; of a run without stages they are the run's own.

    Its table `dreambooth.stages` names all stages with their parts, so that what an earlier one trained is kept.
    """
    stages = stages_of(config)
    own = next((stage for stage in stages if stage.chunk == chunk), None)
    recipe = config.dreambooth
    if own is None or recipe is None:
        return config
    values = own.values
    tables = tuple(stage.values.model_copy(update={"train": stage.values.train or recipe.train}) for stage in stages)
    changed_recipe = {
        "train": values.train or recipe.train,
        "stages": tables,
        "text_encoder_ratio": 1.0,
        **_given(values, "prior_weight", "prior_weight_end", "text_encoder_2_learning_rate"),
    }
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"epochs": own.epochs}),
            "optimizer": config.optimizer.model_copy(
                update=_given(values, "learning_rate", "text_encoder_learning_rate")
            ),
            "dreambooth": recipe.model_copy(update=changed_recipe),
        }
    )


def _given(values: StageConfig, *names: str) -> dict[str, object]:
    return {name: getattr(values, name) for name in names if getattr(values, name) is not None}


def require_packed(config: RunConfig, names: Sequence[str]) -> None:
    """Raise ChunkError unless the chunks of a run in stages, by name in training order, are its stages'."""
    stages = [stage.chunk for stage in stages_of(config)]
    if stages and list(names) != stages:
        raise ChunkError(
            f"the run's stages are {', '.join(stages)}, but data.chunks finds {', '.join(names)}: run `python -m "
            'training pack-concepts RUN.toml` with these settings, and let data.chunks be ["concepts/*"]'
        )


def unread_epochs(config: RunConfig) -> list[str]:
    """Return that data.epochs is given but not read, where it is so."""
    if config.dreambooth is None or not config.dreambooth.stages or config.data.epochs == 1:
        return []
    return [f"data.epochs {config.data.epochs} is not read: each of dreambooth.stages has its own"]


def epochs_of(config: RunConfig) -> Callable[[str], int]:
    """Return a function from a chunk's name to the number of its epochs."""
    by_chunk = {stage.chunk: stage.epochs for stage in stages_of(config)}
    return lambda chunk: by_chunk.get(chunk, config.data.epochs)
