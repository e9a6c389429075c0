"""The data side of the card: images and chunks by data set, dates, and how many images have each closed word.

Counted in the chunks of the workspace that may be trained, combined ones left out: their images stand in the others.
Thresholds, dates, custom words and models come from the DATASET.toml that made it, where one is given.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sharding.chunk import Chunk, ChunkError
from sharding.config import DatasetConfig
from training.card.tables import TOTAL, dotted, in_order, padded, table
from training.status_tables import PERIODS

_CLOSED = ("aesthetic", "quality", "date", "rating")
"""Groups whose words are few, where no policy says which."""
_RATINGS = ("general", "sensitive", "nsfw", "explicit nsfw")
_FIELDS = {
    "period": "date",
    "artist_name": "Display_Name",
    "vn_name": "Full_VN_Name",
    "vn_short": "short_3_letter_name",
}
"""What people call the fields of custom words."""


@dataclass(frozen=True)
class SetSize:
    """A data set of the workspace."""

    name: str
    num_images: int
    num_chunks: int


@dataclass(frozen=True)
class WordCounts:
    """Images by word, for each closed group, and the smallest image (width, height)."""

    by_group: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    smallest: tuple[int, int] | None = None


def set_sizes(chunks: Sequence[Chunk], *, order: Sequence[str]) -> list[SetSize]:
    """Return the size of each data set, from what chunk.json says."""
    images, number = Counter[str](), Counter[str]()
    for chunk in chunks:
        name = chunk.info.name.rpartition("/")[0]
        images[name] += chunk.info.num_samples
        number[name] += 1
    return [SetSize(name, images[name], number[name]) for name in in_order(list(images), order)]


def count_words(chunks: Sequence[Chunk], groups: Sequence[str] = _CLOSED) -> WordCounts:
    """Count the words of closed groups in the indexes. Raises ChunkError for one that cannot be read."""
    counts: dict[str, Counter[str]] = {}
    smallest: tuple[int, int] | None = None
    for chunk in chunks:
        try:
            index = pq.read_table(chunk.index_path, columns=["width", "height", "groups"], partitioning=None)
        except (OSError, pa.ArrowException) as error:
            raise ChunkError(
                f"{chunk.index_path}: cannot be read ({error}); run `python -m sharding verify`"
            ) from error
        entries = pc.list_flatten(index.column("groups"))
        names, tags = pc.struct_field(entries, "group"), pc.struct_field(entries, "tags")
        for group in groups:
            own = pc.list_flatten(tags.filter(pc.equal(names, group)))
            counts.setdefault(group, Counter()).update(
                {entry["values"]: entry["counts"] for entry in pc.value_counts(own).to_pylist()}
            )
        if index.num_rows:
            pixels = pc.multiply(index.column("width").cast(pa.int64()), index.column("height").cast(pa.int64()))
            row = pc.index(pixels, pc.min(pixels)).as_py()
            size = (index.column("width")[row].as_py(), index.column("height")[row].as_py())
            if smallest is None or size[0] * size[1] < smallest[0] * smallest[1]:
                smallest = size
    return WordCounts({group: counter for group, counter in counts.items() if counter}, smallest)


def set_order(config: DatasetConfig | None) -> list[str]:
    """Return data sets as the config names them, periods first; without one, the usual periods."""
    if config is None:
        return list(PERIODS)
    names = [source.dataset or name for name, source in config.sources.items()]
    return [*config.periods, *(name for name in names if name != "{period}")]


def closed_groups(config: DatasetConfig | None) -> Sequence[str]:
    """Return the groups of a caption whose words are counted."""
    tiers = _policy(config).get("tiers", {}) if config is not None else {}
    return tuple(dict.fromkeys([*tiers, *_CLOSED]))


# --- as Markdown ---


def size_table(sizes: Sequence[SetSize]) -> list[str]:
    """Return the seed's data set table."""
    images, chunks = sum(one.num_images for one in sizes), sum(one.num_chunks for one in sizes)
    rows = [(one.name, dotted(one.num_images), padded(one.num_chunks, chunks)) for one in sizes]
    return table(("dataset name", "total images", "total chunk"), [*rows, (TOTAL, dotted(images), str(chunks))])


def size_notes(words: WordCounts, config: DatasetConfig | None) -> list[str]:
    """Return the notes below it: the smallest picture, and how duplicates were found."""
    notes = []
    if words.smallest is not None:
        width, height = words.smallest
        notes.append(f"- Smallest size is {width}x{height} | {dotted(width * height)} pixels")
    if config is not None:
        notes.append(
            f"- Deduped based on image similarity: {config.dedupe.algorithm} within {config.dedupe.radius} bits"
        )
    return ["", "**Note**:", *notes] if notes else []


def tag_sections(words: WordCounts, config: DatasetConfig | None, *, is_shuffled: bool) -> list[str]:
    """Return the sections from `## Tags:` to `## Custom Tags:`, those that have something to say."""
    policy = _policy(config)
    lines = ["## Tags:", "", *_order_lines(policy, is_shuffled=is_shuffled)]
    if config is not None and config.periods:
        dates = [
            (name, str(first) if first == last else f"{first} to {last}")
            for name, (first, last) in config.periods.items()
        ]
        lines += ["### Date:", *table(("tag", "date"), dates), ""]
    for group, counts in words.by_group.items():
        if group not in ("date", "rating"):
            lines += [*_tier_section(group, counts, policy, config), ""]
    if ratings := words.by_group.get("rating"):
        known = in_order(list(ratings), [*(policy.get("rating", {}) or {}).values(), *_RATINGS])
        lines += ["## Rating Tags", *table(("tag", "count"), [(word, dotted(ratings[word])) for word in known]), ""]
    if config is not None and (custom := _custom_rows(config, policy)):
        lines += ["## Custom Tags:", *table(("dataset name", "custom tag"), custom), ""]
    return lines if len(lines) > 2 else []


def _order_lines(policy: Mapping[str, Any], *, is_shuffled: bool) -> list[str]:
    if not policy.get("groups"):
        return []
    own = {*policy.get("tiers", {}), "date", "custom", "rating"}
    words = [
        "rest of the tags" if name == "rest" else f"{name} tags" if name in own else name for name in policy["groups"]
    ]
    said = "Model is trained with random tag order but this is the order in the dataset if you are interested:"
    return [said if is_shuffled else "The order of tags in a caption:", "```", ", ".join(words), "```", ""]


def _tier_section(
    group: str, counts: Mapping[str, int], policy: Mapping[str, Any], config: DatasetConfig | None
) -> list[str]:
    tier = policy.get("tiers", {}).get(group, {})
    steps = [(float(threshold), str(word)) for threshold, word in tier.get("steps", ())]
    model = (config.annotate.get("models", {}) if config is not None else {}).get(tier.get("model", ""), {})
    used = (
        [f"**Model used**: {model.get('head') or model['model']}", ""]
        if model.get("head") or model.get("model")
        else []
    )
    lines = [f"### {group.capitalize()} Tags:", "", *used]
    if not steps:
        return lines + table(("tag", "count"), [(word, dotted(count)) for word, count in sorted(counts.items())])
    digits = max(2, *(len(f"{threshold:g}".partition(".")[2]) for threshold, _ in steps))
    rows = [(f"{threshold:.{digits}f}", word, dotted(counts.get(word, 0))) for threshold, word in steps]
    if rest := str(tier.get("rest", "")):
        rows.append(("rest of them", rest, dotted(counts.get(rest, 0))))
    score = "score at least" if tier.get("comparison") == ">=" else "score greater than"
    return lines + table((score, "tag", "count"), rows)


def _custom_rows(config: DatasetConfig, policy: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for source, template in policy.get("custom", {}).items():
        for name, shown in _FIELDS.items():
            template = template.replace(f"{{{name}}}", shown)
        settings = config.sources.get(source)
        dataset = settings.dataset if settings is not None else ""
        by_date = "image boards" if settings is not None and settings.importer == "booru" else source
        rows.append((by_date if dataset == "{period}" else dataset or source, f"{template},"))
    return rows


def _policy(config: DatasetConfig | None) -> Mapping[str, Any]:
    policy = config.policies.get(config.pack.policy, {}) if config is not None else {}
    return policy if isinstance(policy, Mapping) else {}
