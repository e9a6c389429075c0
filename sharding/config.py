"""Read TOML into frozen settings, and the settings of a dataset.

`Config` and `load_config` serve every TOML of the project. `DatasetConfig` holds one dataset's whole policy; its
`annotate` and `policies` tables belong to captioning, which checks them in a subclass (`captioning.config`).

Paths in a TOML are relative to the current directory: every command starts in the checkout's root.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from sharding.pictures.phash import Algorithm, Turn, check_hash_size, hash_bits

ConfigType = TypeVar("ConfigType", bound="Config")


class ConfigError(ValueError):
    """A settings file is wrong; the message lists every mistake with its file and dotted key."""


class Config(BaseModel):
    """Base of all settings: frozen, unknown keys refused, one default in the class, meaning under each field."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def load_config(path: Path, config_type: type[ConfigType], overrides: Sequence[str] = ()) -> ConfigType:
    """Read a TOML file, apply `key.path=value` overrides, and validate.

    A value of an override is TOML (`1e-5`, `true`, `[1, 2]`, `"text"`); what is not valid TOML is taken as text.
    Raises ConfigError with every mistake at once, FileNotFoundError.
    """
    return parse_config(read_toml(path), config_type, name=str(path), overrides=overrides)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file. Raises ConfigError with line and column for bad syntax, FileNotFoundError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such config file; presets are in configs/") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error


def parse_config(
    values: Mapping[str, Any], config_type: type[ConfigType], *, name: str, overrides: Sequence[str] = ()
) -> ConfigType:
    """Validate already read values; `name` stands in messages for the file. Raises ConfigError."""
    merged = dict(values)
    for override in overrides:
        apply_override(merged, override)
    try:
        return config_type.model_validate(merged)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{name}: {line}" for line in _explain(error, config_type))) from None


def apply_override(values: dict[str, Any], override: str) -> None:
    """Put a `key.path=value` into nested tables, as `load_config` does. Raises ConfigError."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override!r}: expected key.path=value")
    *tables, last = key.strip().split(".")
    for table in tables:
        inner = values.get(table, {})
        if not isinstance(inner, Mapping):
            raise ConfigError(f"--set {override!r}: {table} is a value, not a table")
        values[table] = dict(inner)
        values = values[table]
    try:
        values[last] = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        values[last] = text.strip()


def _explain(error: ValidationError, config_type: type[Config]) -> list[str]:
    lines = []
    for mistake in error.errors():
        where = ".".join(str(step) for step in mistake["loc"])
        message = mistake["msg"].removeprefix("Value error, ")
        if mistake["type"] == "extra_forbidden":
            known = _known_keys(config_type, mistake["loc"][:-1])
            message = "unknown key" + (f"; known here: {', '.join(known)}" if known else "")
            message += "".join(f"; did you mean {key}?" for key in get_close_matches(str(mistake["loc"][-1]), known, 1))
        elif mistake["type"] == "missing":
            message = "required, but not set"
        elif not isinstance(mistake["input"], Mapping):
            message = f"{message[0].lower()}{message[1:]}, got {mistake['input']!r}"
        lines.append(f"{where}: {message}" if where else message)
    return lines


def _known_keys(config_type: Any, location: Sequence[int | str]) -> list[str]:
    for step in location:
        fields = getattr(config_type, "model_fields", None)
        if fields is None:
            return []
        if step in fields:
            annotation = fields[step].annotation
            candidates = [annotation, *getattr(annotation, "__args__", ())]
            config_type = next((c for c in candidates if isinstance(c, type) and issubclass(c, Config)), None)
    return sorted(getattr(config_type, "model_fields", {}))


# --- the dataset ---

_NAME_RULE = "letters, digits, '-', '_', '.' and single inner spaces"


def check_name(name: str) -> str:
    """Return `name` if it can name a folder on every system; raise ValueError otherwise."""
    allowed = all(letter.isalnum() or letter in "-_. {}" for letter in name)
    if not name or not allowed or name != name.strip(" .") or "  " in name:
        raise ValueError(f"must be {_NAME_RULE}")
    return name


Name = Annotated[str, AfterValidator(check_name)]


class SourceConfig(Config):
    """A collection of raw files from one place."""

    root: Path
    """Folder with the files."""
    importer: Literal[
        "folder", "booru", "gelbooru", "anime_pictures", "pixiv", "visual_novel", "kohya", "webdataset"
    ] = "folder"  # fmt: skip
    """How metadata is found: txt sidecars only; post JSON beside the image (Danbooru's, Gelbooru's, Anime-Pictures'
    fields); a folder per artist; a folder per visual novel named `Full Name (abc)`; kohya's `in_json`; tars whose
    members are pictures, JSON and txt."""
    metadata: Path | None = None
    """kohya: its `in_json`, one JSON object by image or JSON Lines (`.jsonl`)."""
    tag_dict: Path | None = None
    """pixiv: JSON object from the site's tags to Danbooru's; then tags that stay non-ASCII are left out."""
    tag_categories: Path | None = None
    """pixiv: JSON object from a tag to its category: 0 general, 3 copyright, 4 character, 5 meta."""
    date_pattern: str = ""
    """Regular expression with the groups `year` and, if wanted, `month` and `day`, searched in the path for a date;
    default: YYYY-MM-DD anywhere, else a folder named by a year."""
    dataset: str = ""
    """Dataset that its pictures are filed under; "{period}" files each by its date; default: the source's name."""
    priority: int = 0
    """Among duplicates, a picture of a source with higher priority is kept before pixels or bytes are compared."""
    is_reference: bool = False
    """Its pictures are only compared against: dedupe drops what looks like them elsewhere, and keeps none of them."""
    masks: Literal["alpha"] | Path | None = None
    """Where pack finds masks: "alpha" takes the picture's own alpha; a folder has `PATH-WITHOUT-ENDING.png` for the
    picture PATH (write "./alpha" for a folder of that name)."""

    @field_validator("date_pattern")
    @classmethod
    def _has_a_year(cls, pattern: str) -> str:
        try:
            groups = set(re.compile(pattern).groupindex)
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from None
        if pattern and "year" not in groups:
            raise ValueError("needs a group (?P<year>…)")
        if "day" in groups and "month" not in groups:
            raise ValueError("has a group day, but none named month")
        return pattern

    @model_validator(mode="after")
    def _tables_suit_the_importer(self) -> "SourceConfig":
        if (self.metadata is not None) != (self.importer == "kohya"):
            raise ValueError('metadata belongs to importer "kohya", which needs it')
        if self.importer != "pixiv" and (self.tag_dict or self.tag_categories):
            raise ValueError('tag_dict and tag_categories belong to importer "pixiv"')
        return self


class FilterConfig(Config):
    """What is dropped at scan time, each by a rule with a name."""

    min_pixels: int = Field(768_000, ge=0)
    """width × height below this is `too_small`; exactly this many pixels pass (1280×600 is 768,000). For "more than
    768,000", as some downloaders have it, say 768_001."""
    max_pixels: int = Field(200_000_000, gt=0)
    """width × height above this is `too_many_pixels`, from the header, before anything is decoded."""
    max_aspect: float = Field(8.0, gt=1)
    """Longer side / shorter side above this is `extreme_aspect`."""
    min_bytes: int = Field(0, ge=0)
    """Smaller files are `too_few_bytes`; exactly this many bytes pass."""
    max_bytes: int | None = Field(None, gt=0)
    """Larger files are `too_many_bytes`; exactly this many bytes pass."""
    oversize: tuple[int, int] | None = None
    """[bytes, pixels]: a file above both is `oversize`."""
    exempt_tags: tuple[str, ...] = ()
    """A record with one of these tags (exact) passes `min_pixels` and `min_bytes`; for `pixel_art`."""
    formats: tuple[Literal["jpeg", "png", "webp", "avif", "jxl", "gif", "bmp", "tiff"], ...] = ()
    """If given, a picture whose content has another format is `format_not_wanted`."""
    extensions: tuple[Annotated[str, Field(pattern=r"^\.[a-z]+$")], ...] = ()
    """If given, a file whose name ends otherwise (".jpg", …; in any case) is `extension_not_wanted`."""
    animated: Literal["drop", "first_frame"] = "drop"
    """Animated pictures are dropped as `animated`, or their first frame is used."""
    tag_blacklist: tuple[str, ...] = ()
    """A record with one of these tags (exact, underscore form, any category) is `blacklisted_tag`."""
    meta_blacklist_substrings: tuple[str, ...] = ()
    """A record with a meta tag that contains one of these is `blacklisted_meta_substring`: "artifacts" hits
    `jpeg_artifacts`. Whole tags belong into `tag_blacklist`."""
    min_score: int | None = None
    """A post with a known score below this is `low_score`."""
    min_fav_count: int | None = None
    """A post with a known number of favourites below this is `low_fav_count`."""
    ratings: tuple[Literal["general", "sensitive", "questionable", "explicit"], ...] = ()
    """If given, a record with another known rating is `rating_not_wanted`."""
    drop_flags: tuple[Literal["is_deleted", "is_banned", "is_flagged", "is_pending"], ...] = ("is_deleted", "is_banned")
    """A post with one of these flags set is dropped under the flag's name."""


class DedupeConfig(Config):
    """Near-duplicates by perceptual hash."""

    algorithm: Algorithm = "phash"
    """An `imagehash` algorithm."""
    hash_size: int = 16
    """Side of the hash, 4 to 32: 8 gives 64 bits, 16 gives 256; for whash a power of 2. For colorhash its `binbits`, 2
    to 8: 3 gives 42 bits."""
    turns: tuple[Turn, ...] = ()
    """Pictures turned in these ways are found, too; each costs another hash per picture. rotate_90 is
    counter-clockwise."""
    radius: int = Field(16, ge=0, le=64)
    """Two pictures within this many bits are duplicates (16 of 256, or 4 of 64, finds re-encodes and resizes)."""
    max_diameter: int = Field(32, ge=0)
    """A member farther than this from its group's keeper starts a group of its own (guards against chains)."""
    keep_variants: bool = False
    """A second look at near pictures: those that differ in a place (another expression, outfit or line of text) are
    variants, and both stay. Stores 4,000 bytes a picture. Measured on sprites, portraits and text lines: 0.98 of the
    variants within 16 bits of 256 are kept apart; re-encodes, resizes and brighter copies stay together at 0.997. In
    scenes where a mouth is 1/80 of the width, only 0.83 are seen."""
    find_crops: bool = False
    """Crops of the same picture are duplicates, too: other aspects, borders, letterboxes; not turned ones. Stores 1,002
    bytes a picture and costs 10 ms to scan. Measured on 684 wallpapers in many sizes and crops: recall 1.000 of 3,374
    true pairs at precision 0.999, where phash alone finds 0.33; of 9:16 parts of landscapes 0.92. Pictures that differ
    in less than 30 % of what they share (a figure before a background) count as the same without keep_variants."""
    keeper: tuple[Literal["priority", "pixels", "lossless", "bytes", "date"], ...] = (
        "priority", "pixels", "lossless", "bytes", "date",
    )  # fmt: skip
    """Order of comparison for which one stays; the larger, the lossless, the older wins; the key breaks ties."""
    merge_tags: bool = True
    """The keeper also gets the tags, and a date or rating if it has none, of those dropped for it."""

    @model_validator(mode="before")
    @classmethod
    def _scale_radii(cls, values: Any) -> Any:
        """Give radius and max_diameter, where not set, the default's share of a hash of another size."""
        if not isinstance(values, Mapping):
            return values
        algorithm, hash_size = values.get("algorithm", "phash"), values.get("hash_size", 16)
        if type(hash_size) is not int or hash_size < 1:
            return values
        bits = hash_bits(algorithm, hash_size)  # hash_size joins, since no validator looks at a default
        return {"hash_size": hash_size, "radius": min(bits // 16, 64), "max_diameter": bits // 8, **values}

    @field_validator("hash_size")
    @classmethod
    def _hash_exists(cls, hash_size: int, info: ValidationInfo) -> int:
        if "algorithm" in info.data:  # else it has a mistake of its own
            check_hash_size(info.data["algorithm"], hash_size)
        return hash_size

    @model_validator(mode="after")
    def _radius_suits_the_hash(self) -> "DedupeConfig":
        bits = hash_bits(self.algorithm, self.hash_size)
        if self.radius > bits // 6:
            raise ValueError(
                f"radius {self.radius} of the {bits} bits of {self.algorithm} with hash_size {self.hash_size} merges "
                f"unrelated pictures: use at most {bits // 6} ({bits // 16} is usual)"
            )
        if self.turns and self.algorithm == "colorhash":
            raise ValueError("turns: a turned picture has the same colorhash; leave turns empty")
        if len(set(self.turns)) < len(self.turns):
            raise ValueError(f"turns: {', '.join(self.turns)}: name each once")
        return self


class WeightRule(Config):
    """Which pictures are shown more often, or count more. Every condition that is given must hold; none: all do."""

    dataset: str = ""
    """Filed under this dataset."""
    source: str = ""
    """Of this source."""
    tags: tuple[str, ...] = ()
    """Has one of these tags, exactly, in underscore form, of any category, as it came with the picture."""
    ratings: tuple[Literal["general", "sensitive", "questionable", "explicit"], ...] = ()
    """Has one of these ratings."""
    custom: dict[str, str] = {}
    """Its importer gave each of these facts this value, e.g. `{ artist_name = "ann" }`."""
    repeats: int | None = Field(None, ge=1, le=1_000)
    """How often it is shown per epoch."""
    loss_weight: float | None = Field(None, gt=0, le=1_000)
    """What its loss is multiplied by."""

    @model_validator(mode="after")
    def _sets_something(self) -> "WeightRule":
        if self.repeats is None and self.loss_weight is None:
            raise ValueError("sets neither repeats nor loss_weight")
        if spaced := [tag for tag in self.tags if " " in tag or not tag]:
            raise ValueError(f"tags are in underscore form: {spaced[0]!r} is not, {spaced[0].replace(' ', '_')!r} is")
        return self


class PlanConfig(Config):
    """Which sample goes into which chunk, how often it is shown and what it counts."""

    chunk_size: int = Field(8_000, gt=0)
    """Samples per chunk; the last chunk of a dataset holds what is left."""
    seed: int = Field(0, ge=0)
    """Seed of the shuffle before cutting."""
    held_out: int = Field(0, ge=0)
    """Samples per dataset set aside as its chunk `held-out`, which no run trains; 0: none."""
    held_out_max_fraction: float = Field(0.1, gt=0, le=0.5)
    """At most this share of a dataset is set aside; the rest is left for training."""
    weights: tuple[WeightRule, ...] = ()
    """Rules in order; of those that apply to a picture the last one that sets repeats, and the last one that sets
    loss_weight, decides. Without one both are 1."""


class PackConfig(Config):
    """How chunks are written."""

    shard_size: int = Field(1_000, gt=0)
    """Samples per tar."""
    policy: Name = "default"
    """The policy whose captions go into index and txt."""
    jpeg_quality: int = Field(95, ge=1, le=100)
    """Quality (4:4:4) for pictures that must be encoded anew: rotated, alpha, other colour space, other formats."""
    lossless_as_png: bool = False
    """Write re-encoded pictures of lossless formats as PNG instead of JPEG."""
    reencode: Literal["needed", "always"] = "needed"
    """Encode anew only what readers could not use as it is or what is resized, or every picture."""
    max_pixels: int = Field(0, ge=0)
    """Larger pictures are resized (Lanczos) to at most this many pixels; 0: none are."""
    pass_through_formats: tuple[Literal["webp", "avif", "jxl", "gif", "bmp", "tiff"], ...] = ()
    """Formats besides JPEG and PNG that go in unchanged when upright, RGB, without alpha or colour profile. Stable
    Cascade's own loader and img2dataset's skip all of them; webdataset does not decode avif and jxl."""
    bad_masks: Literal["drop", "error"] = "drop"
    """A mask that cannot be read or has another size than its picture drops the sample as `bad_mask`, or stops."""


class CombineConfig(Config):
    """Waves: chunk k of every dataset mixed into combined chunks."""

    name: Name = "combined"
    """Folder under chunks/ that receives them."""
    chunk_size: int = Field(8_000, gt=0)
    """Samples per combined chunk; a wave is shuffled and cut into equal chunks of at most this size."""
    seed: int = Field(0, ge=0)
    """Seed of the shuffle within a wave."""


class DatasetConfig(Config):
    """One dataset.toml: sources, filters, periods, dedupe, plan, pack, combine, and captioning's two tables."""

    name: Name
    """Name of the dataset, for reports."""
    sources: dict[Name, SourceConfig] = Field(min_length=1)
    """By name; the name stands in the manifest."""
    periods: dict[Name, tuple[int, int]] = {}
    """First and last year of each tier of dates, both included; a picture outside has no period."""
    part_size: int = Field(8_000, gt=0)
    """Files per part: the unit of resumable work of scan and annotate."""
    filters: FilterConfig = FilterConfig()
    dedupe: DedupeConfig = DedupeConfig()
    plan: PlanConfig = PlanConfig()
    pack: PackConfig = PackConfig()
    combine: CombineConfig = CombineConfig()
    max_broken_fraction: float = Field(0.05, ge=0, le=1)
    """A stage stops with exit code 3 when more than this share of its images is broken."""
    annotate: dict[str, Any] = {}
    """Models that look at each image; checked by captioning."""
    policies: dict[str, Any] = {}
    """What turns raw numbers into captions, by name; checked by captioning."""

    @model_validator(mode="after")
    def _periods_are_disjoint(self) -> "DatasetConfig":
        spans = sorted((first, last, name) for name, (first, last) in self.periods.items())
        for first, last, name in spans:
            if first > last:
                raise ValueError(f"periods.{name}: first year {first} is after last year {last}")
        for (_, last, name), (first, _, other) in pairwise(spans):
            if first <= last:
                raise ValueError(f"periods.{name} and periods.{other} both hold the year {first}")
        for name, source in self.sources.items():
            if source.dataset == "{period}" and not self.periods:
                raise ValueError(f'sources.{name}.dataset is "{{period}}", but there is no [periods] table')
        return self

    @model_validator(mode="after")
    def _rules_name_what_there_is(self) -> "DatasetConfig":
        datasets = {source.dataset or name for name, source in self.sources.items()} - {"{period}"} | {*self.periods}
        for number, rule in enumerate(self.plan.weights):
            for field, name, known in (("source", rule.source, {*self.sources}), ("dataset", rule.dataset, datasets)):
                if name and name not in known:
                    raise ValueError(
                        f"plan.weights.{number}.{field}: there is no {name!r}; there are {', '.join(sorted(known))}"
                    )
        if 0 < self.pack.max_pixels < self.filters.min_pixels:
            raise ValueError(
                f"pack.max_pixels ({self.pack.max_pixels:,}) is below filters.min_pixels "
                f"({self.filters.min_pixels:,}): every resized picture would be too small"
            )
        return self

    def period_of(self, year: int | None) -> str:
        """Return the name of the period that holds `year`, or "" for none."""
        if year is None:
            return ""
        return next((name for name, (first, last) in self.periods.items() if first <= year <= last), "")

    def file_under(self, source: str, year: int | None) -> tuple[str, str]:
        """Return (dataset, period) of a picture; dataset is "" when it is filed by date and has no period."""
        period = self.period_of(year)
        dataset = self.sources[source].dataset or source
        return (period if dataset == "{period}" else dataset), period
