"""The settings of a run: one run.toml. No torch.

Defaults are the safe choice (fp32 master weights, bf16 autocast); what the seed's kohya command does instead is said
by the presets. Paths are relative to the current directory.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, model_validator

from sharding.config import Config, Name
from training.config.captions import CaptionConfig
from training.config.data import BatchConfig, BucketConfig, DataConfig
from training.config.dreambooth import DreamBoothConfig, ratio_problems
from training.config.latents import LatentsConfig, ahead_problems
from training.config.lora import LoraConfig, TokensConfig, adapter_problems
from training.config.optimizer import (
    OptimizerConfig,
    ScheduleConfig,
    fused_backward_problems,
    optimizer_problems,
)
from training.config.parallel import ParallelConfig, parallel_problems
from training.config.precision import EmaConfig, PrecisionConfig
from training.config.saving import SaveConfig, formats_of
from training.config.stage_c import StageCConfig
from training.config.watching import PreviewConfig, TrackerConfig, ValidationConfig


class RunConfig(Config):
    """One run.toml."""

    FREE: ClassVar = frozenset({"device", "compile", "max_skipped_steps"})

    name: Name
    """Name of the run, for people and trackers."""
    seed: int = Field(0, ge=0)
    """Of all counted randomness and the order of samples."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""
    compile: Literal["no", "inductor", "aot_eager"] = "no"
    """Let torch.compile make kernels of the trained forward, one set per bucket size: faster after a slow start.
    `inductor` needs a C++ compiler or triton; `aot_eager` only traces, to see whether a network can be compiled."""
    max_skipped_steps: int = Field(10, ge=0)
    """Consecutive steps with a non-finite loss or gradient passed over before the run goes back to an earlier state."""
    data: DataConfig
    batch: BatchConfig = BatchConfig()
    buckets: BucketConfig = BucketConfig()
    caption: CaptionConfig = CaptionConfig()
    latents: LatentsConfig = LatentsConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    precision: PrecisionConfig = PrecisionConfig()
    ema: EmaConfig = EmaConfig()
    parallel: ParallelConfig = ParallelConfig()
    save: SaveConfig = SaveConfig()
    preview: PreviewConfig = PreviewConfig()
    validation: ValidationConfig = ValidationConfig()
    trackers: TrackerConfig = TrackerConfig()
    stage_c: StageCConfig | None = None
    """The recipe `stage_c`; a run has one recipe."""
    dreambooth: DreamBoothConfig | None = None
    """The recipe `dreambooth`."""
    lora: LoraConfig | None = None
    """Train adapters, not the networks."""
    tokens: TokensConfig | None = None
    """Train embeddings of single tokens, too."""

    @property
    def recipe(self) -> StageCConfig | DreamBoothConfig:
        """The table of the run's recipe."""
        return self.of_stage_c if self.dreambooth is None else self.dreambooth

    @property
    def of_stage_c(self) -> StageCConfig:
        """The table [stage_c]. Raises ValueError when the run has another recipe."""
        if self.stage_c is None:
            raise ValueError("this is for the recipe stage_c; the run's is dreambooth")
        return self.stage_c

    @property
    def of_dreambooth(self) -> DreamBoothConfig:
        """The table [dreambooth]. Raises ValueError when the run has another recipe."""
        if self.dreambooth is None:
            raise ValueError("this is for the recipe dreambooth; the run's is stage_c")
        return self.dreambooth

    @property
    def recipe_name(self) -> Literal["stage_c", "dreambooth"]:
        """Name of the recipe, and of its table."""
        return "stage_c" if self.dreambooth is None else "dreambooth"

    def shown(self) -> dict[str, Any]:
        """Return the settings as others may see them: without the webhook, whose address may hold a secret."""
        return self.model_dump(mode="json", exclude={"trackers": {"webhook"}})

    @property
    def trains_in_text_encoder(self) -> bool:
        """Whether anything in the text encoder is trained: all of it, adapters, or tokens."""
        has_adapters = self.lora is not None and self.lora.text_encoder is not None
        return self.recipe.train_text_encoder or has_adapters or self.tokens is not None

    @model_validator(mode="after")
    def _has_one_recipe(self) -> "RunConfig":
        if (self.stage_c is None) == (self.dreambooth is None):
            raise ValueError("a run has one recipe: give the table [stage_c] or the table [dreambooth]")
        return self

    @model_validator(mode="after")
    def _sizes_fit(self) -> "RunConfig":
        if self.buckets.step % self.recipe.side_multiple:
            raise ValueError(
                f"buckets.step {self.buckets.step} must be a multiple of {self.recipe.side_multiple}, the encoder's "
                "stride"
            )
        return self

    @model_validator(mode="after")
    def _previews_can_be_made(self) -> "RunConfig":
        given = [key for key in ("prompts", "file") if getattr(self.preview, key)]
        if given and not self.recipe.can_preview:
            raise ValueError(f"preview.{given[0]} is given, but stage_c.previewer is not: no picture can be made")
        for number, prompt in enumerate(self.preview.prompts):
            if problems := self.recipe.prompt_problems(prompt):
                raise ValueError(f"preview.prompts.{number}: {'; '.join(problems)}")
        return self

    @model_validator(mode="after")
    def _formats_are_of_the_recipe(self) -> "RunConfig":
        own = formats_of(self.recipe_name)
        if other := [name for name in self.save.export_formats if name not in own]:
            raise ValueError(
                f"save.export_formats {', '.join(other)}: the recipe {self.recipe_name} writes {', '.join(own)}"
            )
        return self

    @model_validator(mode="after")
    def _optimizer_fits(self) -> "RunConfig":
        problems = optimizer_problems(self.optimizer, self.schedule, self.precision, self.ema)
        problems += fused_backward_problems(
            self.optimizer, self.precision, micro_batches_per_step=self.batch.micro_batches_per_step
        )
        problems += parallel_problems(self)
        problems += ahead_problems(self)
        problems += adapter_problems(self)
        if self.dreambooth is not None:
            problems += ratio_problems(self.dreambooth, epochs=self.data.epochs)
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _free_keys(table: type[BaseModel], prefix: str = "") -> Iterator[str]:
    yield from (prefix + key for key in getattr(table, "FREE", ()))
    for name, field in table.model_fields.items():
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _free_keys(kind, f"{prefix}{name}.")


FREE_KEYS = frozenset(_free_keys(RunConfig))
"""Keys that may differ between launches of one run: they change speed, places or what is kept, not what is trained.
Weights may be moved: those of trained parts come from the state (the file only gives the shapes), and frozen ones must
hold the same values as at the first launch (run.json, frozen_weights)."""

GROWING_KEYS = frozenset({"data.epochs", "data.chunks", "schedule.total_steps"})
"""Keys that may get larger: the run is extended, the ledger says so, and run.toml holds the new value from then on."""
