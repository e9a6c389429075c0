"""What happens to captions when they are trained: the settings of `caption_text`, checked. Pure, no torch."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from training.wildcards import unmatched_braces

SENTENCE_GROUP = "sentence"
"""The group of captions in which `compose` puts what a captioner said; each of its tags is one description."""
MixForm = Literal["tags", "sentences", "kept_sentences", "sentences_tags", "tags_sentences"]
_MIX_FORMS = ("tags", "sentences", "kept_sentences", "sentences_tags", "tags_sentences")


@dataclass(frozen=True)
class CaptionSettings:
    """What happens to captions; by default nothing. Raises ValueError for settings that cannot be."""

    separator: str = ", "
    """Between tags. Parts are stripped and joined with it again, a bare comma as ", "."""
    keep_separator: str = ""
    """What stands before this mark stays in front, what stands behind a second one stays behind; not written itself.
    keep_first_tags is for captions without it."""
    secondary_separator: str = ""
    """Tags joined by it are shuffled and dropped as one; then `separator` stands between them."""
    shuffle: bool = False
    """Shuffle the tags that are not kept."""
    keep_first_tags: int = 0
    """The first so many tags stay in front."""
    keep_groups: tuple[str, ...] = ()
    """Then come the tags of these groups, in this order."""
    never_shuffled: tuple[str, ...] = ()
    """Then these tags, where a caption has them."""
    tag_dropout_fraction: float = 0.0
    """Probability of each tag that is not kept to be left out."""
    tag_dropout_groups: Mapping[str, float] = field(default_factory=dict)
    """By group another probability, which holds for kept tags and sentences, too."""
    caption_dropout_fraction: float = 0.0
    """Probability of the caption to be empty."""
    caption_dropout_every_epochs: int = 0
    """Every so many epochs, counted from 1, all captions are empty; 0 = never."""
    token_warmup_min: int = 1
    """Tags (after those kept) at global step 0 of a warm-up."""
    token_warmup_steps: int = 0
    """Global step from which on all tags are used; 0 = no warm-up."""
    token_warmup_fraction: float = 0.0
    """The same as a fraction of total_steps, rounded down."""
    total_steps: int | None = None
    """Steps of the whole run, where they are known; only token_warmup_fraction needs them."""
    lines: Literal["all", "first", "random"] = "all"
    """Of a caption of several lines."""
    line_weights: tuple[float, ...] = ()
    """With random: of the first, second … line; further lines have the last weight. Empty = equal."""
    wildcards: bool = False
    """Replace {a|b} by one of its alternatives; see `training.wildcards`."""
    mix: Mapping[str, float] = field(default_factory=dict)
    """Weights of the forms (MixForm) of a caption that has tags and sentences; empty = both, as written."""
    prefix: str = ""
    """Put before the caption with a space; never shuffled, dropped with the whole caption only."""
    suffix: str = ""
    """Put behind the caption with a space, in the same way."""
    compat: Literal["none", "kohya"] = "none"
    """kohya: prefix and suffix are part of the text that is split, groups are not looked at, empty parts stay, tags are
    joined by ", " whatever the separator, a caption that nothing touches keeps its marks, no nested wildcards."""

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_marks()
        if self.token_warmup_steps and self.token_warmup_fraction:
            raise ValueError("token_warmup_steps and token_warmup_fraction are both set; keep one")
        if self.token_warmup_fraction and self.total_steps is None:
            raise ValueError(
                f"token_warmup_fraction {self.token_warmup_fraction} needs schedule.total_steps; set it, or say"
                " token_warmup_steps"
            )
        if self.line_weights and self.lines != "random":
            raise ValueError(f'line_weights needs lines = "random", got {self.lines!r}')
        if self.compat == "kohya" and (self.keep_groups or self.tag_dropout_groups or self.mix):
            raise ValueError(
                'compat = "kohya" does not look at groups: leave out keep_groups, tag_dropout_groups and mix, or compat'
            )

    @property
    def warmup_steps(self) -> int:
        """Global step from which on all tags are used."""
        return self.token_warmup_steps or math.floor(self.token_warmup_fraction * (self.total_steps or 0))

    @property
    def takes_apart(self) -> bool:
        """Every caption is split into its tags and joined again; over the whole run, also when a warm-up is over."""
        return bool(
            self.shuffle or self.warmup_steps or self.tag_dropout_fraction or self.tag_dropout_groups or self.mix
        )

    def check_groups(self, known: Collection[str]) -> None:
        """Raise ValueError for a group that the settings name and no caption has.

        known: the groups of all captions of the run (`caption_parts.known_groups`); a single chunk may lack one.
        """
        named = dict.fromkeys(self.keep_groups, "keep_groups")
        named |= dict.fromkeys(self.tag_dropout_groups, "tag_dropout_groups")
        if set(self.mix) - {"tags"}:
            named[SENTENCE_GROUP] = "mix"
        unknown = [f"{setting}: {name!r}" for name, setting in named.items() if name not in known]
        if unknown:
            raise ValueError(
                f"caption.{', caption.'.join(unknown)}: no caption has a tag of this group; the captions have "
                + (", ".join(sorted(known)) or "no groups at all")
            )

    def _check_ranges(self) -> None:
        fractions = {
            name: getattr(self, name)
            for name in ("tag_dropout_fraction", "caption_dropout_fraction", "token_warmup_fraction")
        }
        fractions |= {f"tag_dropout_groups.{name}": value for name, value in self.tag_dropout_groups.items()}
        for name, value in fractions.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: must be between 0 and 1, got {value}")
        for name in ("keep_first_tags", "token_warmup_min", "token_warmup_steps", "caption_dropout_every_epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must not be negative, got {getattr(self, name)}")
        if self.caption_dropout_every_epochs == 1:
            raise ValueError("caption_dropout_every_epochs: 1 would empty every caption; say 2 or more, or 0 for never")
        for form in self.mix:
            if form not in _MIX_FORMS:
                raise ValueError(f"mix.{form}: unknown; known: {', '.join(_MIX_FORMS)}")
        for name, weights in (("mix", list(self.mix.values())), ("line_weights", list(self.line_weights))):
            if weights and (min(weights) < 0 or max(weights) == 0 or not all(map(math.isfinite, weights))):
                raise ValueError(f"{name}: weights must not be negative and not all be 0, got {weights}")

    def _check_marks(self) -> None:
        if not self.separator.strip():
            raise ValueError(f"separator: must be more than spaces, got {self.separator!r}")
        marks = {name: getattr(self, name) for name in ("separator", "keep_separator", "secondary_separator")}
        for name, mark in marks.items():
            if mark and (mark != mark.strip() and name != "separator"):
                raise ValueError(f"{name}: spaces around it are ignored anyway; leave them out, got {mark!r}")
            if self.wildcards and ("{" in mark or "}" in mark):
                raise ValueError(f"{name}: must hold no braces when wildcards are on, got {mark!r}")
        stripped = [mark.strip() for mark in marks.values() if mark]
        for mark in stripped:
            if sum(mark in other for other in stripped) > 1:
                raise ValueError(
                    "separator, keep_separator and secondary_separator must not be part of each other, got "
                    + ", ".join(repr(other) for other in marks.values() if other)
                )
        for name in ("prefix", "suffix"):
            text = getattr(self, name)
            if self.wildcards and (alone := unmatched_braces(text)):
                raise ValueError(
                    f"{name}: the brace at position {alone[0]} has no partner or nothing inside; write {{{{ or }}}} for"
                    f" a brace itself, got {text!r}"
                )
            if self.compat == "none" and self.keep_separator and self.keep_separator in text:
                raise ValueError(
                    f"{name}: it is never shuffled, so it needs no {self.keep_separator!r}; leave the mark out, or say"
                    f' compat = "kohya", got {text!r}'
                )
