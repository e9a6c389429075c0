"""The `policies` table of a dataset.toml: how raw numbers and tags become captions.

Only settings; `compose` applies them. Changing a policy never runs a model. What concerns single words is in
`word_rules`, what concerns tags in `tag_rules`.
"""

from string import Formatter

from pydantic import Field, model_validator

from captioning.sentences import SentencesConfig
from captioning.spelling import clean_word
from captioning.tag_files import TagList, TagLists, TagMap
from captioning.tag_rules import TagsConfig
from captioning.word_rules import DateWordsConfig, RatingWordsConfig, StyleWordsConfig, TierConfig
from sharding.config import Config, Name

FIXED_GROUPS = (
    "first", "date", "year", "style", "custom", "rating", "count", "character", "series", "artist", "medium", "meta",
    "rest",
)  # fmt: skip
"""Groups of words that every policy may order; each table of tiers and of tag_groups adds one under its own name."""
TAG_TEMPLATE_FIELD = "{tag}"


class TokensConfig(Config):
    """The length of a caption in tokens of a CLIP text encoder."""

    max_tokens: int = Field(0, ge=0)
    """Longest caption, without begin and end token (75 per window); 0: no limit. Sentences of a captioner are neither
    counted nor cut."""
    tokenizer: str = "training/stage_c/clip_bpe/bpe_simple_vocab_16e6.txt.gz"
    """OpenAI's vocabulary file, a folder with tokenizer.json or vocab.json and merges.txt, or a hub id."""
    cut_first: tuple[str, ...] = ()
    """Groups whose words go first, then the other groups, the last one first; within a group the last word first."""


class PolicyConfig(Config):
    """Which words a caption is made of, and in which order."""

    groups: tuple[str, ...] = Field(min_length=1)
    """Order of the groups of words: names of `tiers` and `tag_groups`, and of first, date, year, style, custom,
    rating, count, character, series, artist, medium, meta, rest. Tags of a group that is not listed go to rest (media
    to meta), and nowhere without it; a word that already stands is not repeated."""
    tiers: dict[Name, TierConfig] = Field(default_factory=dict)
    """Tables of thresholds by the name of their group."""
    date: DateWordsConfig = DateWordsConfig()
    """Which pictures get their period or year as a word."""
    style: StyleWordsConfig = StyleWordsConfig()
    """The decade that a picture imitates."""
    custom: dict[Name, str] = Field(default_factory=dict)
    """By source: words with {artist_name} and other keys of the record's `custom` map, {period}, {year}, {dataset} or
    {source}; of words separated by commas those are left out whose fields are unknown for a picture."""
    rating: RatingWordsConfig = RatingWordsConfig()
    """Words for ratings."""
    tags: TagsConfig = TagsConfig()
    """Tags of the tagger and of the record."""
    tag_groups: TagLists = Field(default_factory=dict)
    """Group → general tags that belong to it, `*` standing for anything; exact names go before patterns, the first
    group wins. "wiki_character" comes with the package."""
    templates: dict[str, str] = Field(default_factory=dict)
    """By group of tags: the word, with {tag} for the spelled tag: artist = "art by {tag}"."""
    replace: TagMap = Field(default_factory=dict)
    """Word → word, as they stand in captions, of any group; "" drops it."""
    first_words: TagList = ()
    """Words that stand in the group `first`, in this order, whatever their group would be."""
    characters: dict[Name, str] = Field(default_factory=dict)
    """By source: a character tag that all its pictures get."""
    traits: TagLists = Field(default_factory=dict)
    """Character tag → general tags that its name shall carry: they are dropped where the character is.
    `python -m captioning traits` measures such a table."""
    tokens: TokensConfig = TokensConfig()
    """How long captions may be."""
    sentences: SentencesConfig = SentencesConfig()
    """Whether what a captioner said stands in captions."""
    fallback: str = ""
    """Words, separated by commas, of captions that would be empty; they stand in the group custom, or else rest."""
    warn_above_tags: int = Field(0, ge=0)
    """Captions with more words are counted and reported; 0: not."""

    @property
    def fallback_words(self) -> tuple[str, ...]:
        """The words of `fallback`, none twice."""
        return tuple(dict.fromkeys(filter(None, map(clean_word, self.fallback.split(",")))))

    @property
    def fallback_group(self) -> str:
        """Where the words of `fallback` stand; "" for nowhere."""
        return next((group for group in ("custom", "rest") if group in self.groups), "")

    @property
    def scorers(self) -> dict[str, str]:
        """The scorers that are needed, by the setting that names them."""
        named = {
            f"tiers.{tier}.{'model' if model == table.model else f'also.{model}'}": model
            for tier, table in self.tiers.items()
            for model in table.models
        }
        named |= {"date.model": self.date.model} if self.date.model else {}
        return named | ({"style.model": self.style.model} if self.style.model else {})

    @model_validator(mode="after")
    def _groups_are_known(self) -> "PolicyConfig":
        known = (*self.tiers, *self.tag_groups, *FIXED_GROUPS)
        self._check_groups("groups", self.groups, known)
        for kind, names in (("tiers", self.tiers), ("tag_groups", self.tag_groups)):
            if clash := [name for name in names if name in FIXED_GROUPS]:
                raise ValueError(f"{kind}.{clash[0]}: the name of another group; known: {', '.join(FIXED_GROUPS)}")
        if both := [name for name in self.tiers if name in self.tag_groups]:
            raise ValueError(f"tiers.{both[0]}: tag_groups has a group of this name")
        for tier in self.tiers:
            if tier not in self.groups:
                raise ValueError(f"tiers.{tier}: missing in groups, so its words would stand nowhere")
        for name, value in (("custom", self.custom), ("first", self.first_words), ("style", self.style.model)):
            if value and name not in self.groups:
                setting = {"first": "first_words", "style": "style.model"}.get(name, name)
                raise ValueError(f"{setting}: groups lacks {name!r}, so its words would stand nowhere")
        if self.fallback and not (self.fallback_words and self.fallback_group):
            raise ValueError(f"fallback: needs words, and custom or rest in groups to stand in; got {self.fallback!r}")
        self._check_groups("templates", tuple(self.templates), known)
        self._check_groups("tags.record_only", self.tags.record_only, known)
        self._check_groups("tokens.cut_first", self.tokens.cut_first, self.groups)
        for group, template in self.templates.items():
            if TAG_TEMPLATE_FIELD not in template or "," in template:
                raise ValueError(f"templates.{group}: needs {TAG_TEMPLATE_FIELD} and no comma, got {template!r}")
        return self

    @model_validator(mode="after")
    def _templates_have_known_fields(self) -> "PolicyConfig":
        for source, template in self.custom.items():
            try:
                fields = template_fields(template)
            except ValueError as error:
                raise ValueError(f"custom.{source}: {error} in {template!r}") from None
            if bad := [name for name in fields if not name.isidentifier()]:
                raise ValueError(f"custom.{source}: {{{bad[0]}}} is not the name of a field in {template!r}")
        for word, other in self.replace.items():
            if "," in other:
                raise ValueError(f"replace.{word}: {other!r} has a comma, which would make two words of it")
        if self.date.year.replace("{year}", "").strip("{}") != self.date.year.replace("{year}", ""):
            raise ValueError(f"date.year: only {{year}} can stand in braces, got {self.date.year!r}")
        return self

    def _check_groups(self, setting: str, groups: tuple[str, ...], known: tuple[str, ...]) -> None:
        for group in groups:
            if group not in known:
                raise ValueError(f"{setting}: unknown group {group!r}; known: {', '.join(known)}")
        if len(set(groups)) != len(groups):
            raise ValueError(f"{setting}: a group stands twice in {', '.join(groups)}")


def template_fields(template: str) -> list[str]:
    """Return the names in braces of a custom template, in order. Raises ValueError for unbalanced braces."""
    return [field for _, field, _, _ in Formatter().parse(template) if field is not None]
