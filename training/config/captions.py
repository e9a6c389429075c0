"""Settings of a run: what happens to a caption each time its image is trained."""

from typing import Literal

from pydantic import Field, model_validator

from sharding.config import Config
from training.caption_settings import CaptionSettings, MixForm


class CaptionConfig(Config):
    """What happens to a caption each time its image is trained."""

    separator: str = ", "
    """Between tags, when splitting a caption without groups and when joining."""
    keep_separator: str = ""
    """kohya's keep_tokens_separator (`|||`): what stands before it in a caption stays in front, what stands behind a
    second one stays behind; the mark itself is not trained."""
    secondary_separator: str = ""
    """Tags joined by it (`sky;;;cloud`) are shuffled and dropped as one, then `separator` stands between them."""
    shuffle: bool = True
    """Shuffle the tags that are not kept."""
    keep_groups: tuple[str, ...] = ()
    """Tag groups that stay in front in this order (`aesthetic`, `quality`, …)."""
    keep_first_tags: int = Field(0, ge=0)
    """For captions without groups: this many tags stay in front."""
    never_shuffled: tuple[str, ...] = ()
    """Tags that keep their place in front when present."""
    tag_dropout_fraction: float = Field(0.0, ge=0, lt=1)
    """Probability of leaving out each tag that is not kept."""
    tag_dropout_groups: dict[str, float] = Field(default_factory=dict)
    """By tag group another probability, for its kept tags, too: `{ character = 0, period = 0.1 }`."""
    caption_dropout_fraction: float = Field(0.0, ge=0, lt=1)
    """Probability of training an image with an empty caption."""
    caption_dropout_every_epochs: int = Field(0, ge=0)
    """Every so many epochs of a chunk all captions are empty (kohya's caption_dropout_every_n_epochs); 0 is never."""
    token_warmup_min: int = Field(1, gt=0)
    """Tags at global step 0 of a warm-up."""
    token_warmup_steps: int = Field(0, ge=0)
    """Global steps over which the number of tags grows to all; 0 is off."""
    token_warmup_fraction: float = Field(0.0, ge=0, le=1)
    """The same as a fraction of schedule.total_steps, which must be set then."""
    lines: Literal["all", "first", "random"] = "all"
    """Of a caption of several lines. `random` draws one per showing."""
    line_weights: tuple[float, ...] = ()
    """With lines = "random": weights of the first, second … line; further lines have the last. Empty is equal."""
    wildcards: bool = False
    """`{a|b}` becomes one of its alternatives per showing, nested ones too; `{{` and `}}` are a brace."""
    mix: dict[MixForm, float] = Field(default_factory=dict)
    """Weights of the forms of a caption with tags and sentences; empty is both, as composed."""
    prefix: str = ""
    """Text before every caption, joined by a space."""
    suffix: str = ""
    """Text behind every caption, joined by a space."""
    compat: Literal["none", "kohya"] = "none"
    """kohya: as its process_caption where ours differs."""

    @model_validator(mode="after")
    def _go_together(self) -> "CaptionConfig":
        # The horizon stands in another table; which one it is matters to nothing that is checked here.
        CaptionSettings(**self.model_dump(), total_steps=1)
        return self
