"""Settings of a run: what happens to a caption each time its image is trained."""

from pydantic import Field

from sharding.config import Config


class CaptionConfig(Config):
    """What happens to a caption each time its image is trained."""

    separator: str = ", "
    """Between tags, when splitting a caption without groups and when joining."""
    shuffle: bool = True
    """Shuffle the tags that are not kept in front."""
    keep_groups: tuple[str, ...] = ()
    """Tag groups that stay in front in this order (`aesthetic`, `quality`, …)."""
    keep_first_tags: int = Field(0, ge=0)
    """For captions without groups: this many tags stay in front."""
    never_shuffled: tuple[str, ...] = ()
    """Tags that keep their place in front when present."""
    tag_dropout_fraction: float = Field(0.0, ge=0, lt=1)
    """Probability of leaving out each tag that is not kept."""
    caption_dropout_fraction: float = Field(0.0, ge=0, lt=1)
    """Probability of training an image with an empty caption."""
    token_warmup_min: int = Field(1, gt=0)
    """Tags at global step 0, when token_warmup_steps is not 0."""
    token_warmup_steps: int = Field(0, ge=0)
    """Global steps over which the number of tags grows to all; 0 is off."""
    prefix: str = ""
    """Text before every caption, joined by a space."""
    suffix: str = ""
    """Text behind every caption, joined by a space."""
