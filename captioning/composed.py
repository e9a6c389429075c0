"""A policy's captions as `compose` made them, with what edits and stats ask beside them. Nothing is written."""

from collections.abc import Collection, Iterator
from pathlib import Path
from sys import intern

import pyarrow as pa
import pyarrow.compute as pc

from captioning.compose import compose
from captioning.config import CaptioningConfig
from captioning.edit_filter import CaptionRow
from captioning.part_input import AnnotationMissingError
from captioning.policy import PolicyConfig
from captioning.taggers.base import TaggerSettings
from sharding.config import ConfigError
from sharding.schema import Workspace
from sharding.tables import list_parts, read_part


def scorers_of(config: CaptioningConfig) -> list[str]:
    """Return the names of all models that give scores."""
    return [name for name, model in config.annotate.models.items() if not isinstance(model, TaggerSettings)]


def caption_parts(workspace: Workspace, policy: str) -> list[Path]:
    """Return the parts of a policy's captions. Raises FileNotFoundError before `compose` has run."""
    parts = list_parts(workspace.captions(policy))
    if not parts:
        raise FileNotFoundError(
            f"{workspace.captions(policy)}: no parts; run `python -m captioning compose --policy {policy}` first"
        )
    return parts


def known_policy(config: CaptioningConfig, policy: str) -> PolicyConfig:
    """Return a policy's settings. Raises ConfigError for an unknown one."""
    if policy not in config.policies:
        raise ConfigError(f"policy {policy!r}: unknown; the dataset has {', '.join(config.policies) or 'none'}")
    return config.policies[policy]


def caption_rows(
    config: CaptioningConfig, workspace: Workspace, part: Path, scorers: Collection[str]
) -> Iterator[CaptionRow]:
    """Yield the captions of a part with their sources, datasets and the scores of some scorers."""
    captions = read_part(part)
    keys = captions.column("key")
    records = _aligned(workspace.kept / part.name, ["key", "source", "created_at"], keys)
    years = pc.fill_null(pc.year(records.column("created_at")), 0).to_pylist()
    sources = records.column("source").to_pylist()
    scores = {}
    for name in sorted(scorers):
        table = _aligned(workspace.annotations(name) / part.name, ["key", "score"], keys)
        scores[name] = table.column("score").to_pylist()
    for place, row in enumerate(captions.to_pylist()):
        source = sources[place]
        dataset = config.file_under(source, years[place] or None)[0] if source in config.sources else ""
        yield CaptionRow(
            key=row["key"],
            words=tuple((entry["group"], intern(word)) for entry in row["groups"] for word in entry["tags"]),
            text=row["text"],
            source=source or "",
            dataset=dataset,
            scores={name: values[place] for name, values in scores.items()},
        )


def _aligned(path: Path, columns: list[str], keys: pa.ChunkedArray) -> pa.Table:
    """Return rows of a part in the order of `keys`, null where it has none."""
    table = read_part(path, columns)
    return table if table.column("key").equals(keys) else table.take(pc.index_in(keys, value_set=table.column("key")))


def not_current(config: CaptioningConfig, workspace: Workspace, *, policy: str) -> str:
    """Return what is to be done before a policy's captions are current, "" when they are."""
    try:
        num_stale = compose(config, workspace, policy=policy, dry_run=True).num_parts_written
    except AnnotationMissingError as error:
        return str(error)
    if not num_stale:
        return ""
    parts = "1 part is" if num_stale == 1 else f"{num_stale:,} parts are"
    return (
        f"{workspace.captions(policy)}: {parts} missing or not current; run "
        f"`python -m captioning compose --policy {policy}` first"
    )
