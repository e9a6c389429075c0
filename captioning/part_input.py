"""What a part of captions is made of: its records and what models said, aligned by key; and the digest of all that."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captioning.config import CaptioningConfig
from captioning.policy import PolicyConfig
from captioning.taggers.base import LABELS_FILE
from sharding.files import digest_of
from sharding.schema import TAG_CATEGORIES, Workspace
from sharding.tables import DamagedPartError, part_metadata, read_part

_VERSION = 3
_RECORD_COLUMNS = (
    "key", "source", "created_at", "rating", "custom", "num_bytes", "format",
    *(f"tags_{name}" for name in TAG_CATEGORIES),
)  # fmt: skip


class AnnotationMissingError(ValueError):
    """Annotations that the policy needs are absent, or belong to other keys or another model."""


@dataclass(frozen=True)
class PartInput:
    """Records (MANIFEST, some columns) and annotations by model, row by row the same pictures."""

    records: pa.Table
    annotations: Mapping[str, pa.Table]

    def scores(self, model: str) -> npt.NDArray[np.float32]:
        """Return (N,) float32, NaN where the status is not ok."""
        annotation = self.annotations[model]
        scores = np.asarray(pc.fill_null(annotation.column("score"), float("nan")), dtype=np.float32).copy()
        scores[np.asarray(pc.not_equal(annotation.column("status"), "ok"))] = np.nan
        return scores

    def years(self, model: str) -> npt.NDArray[np.int64]:
        """Return (N,) years, of a scorer or, without a model, of the records; 0 where there is no date."""
        if model:
            scores = self.scores(model)
            return np.where(np.isfinite(scores), scores, 0).astype(np.int64)
        return np.asarray(pc.fill_null(pc.year(self.records.column("created_at")), 0), dtype=np.int64)


def read_input(workspace: Workspace, part: Path, rules: PolicyConfig) -> PartInput:
    """Read what the policy needs. Raises AnnotationMissingError, DamagedPartError."""
    records = read_part(part, _RECORD_COLUMNS)
    paths = annotation_parts(workspace, part, rules)
    return PartInput(records, {model: _aligned(path, records.column("key")) for model, path in paths.items()})


def annotation_parts(workspace: Workspace, part: Path, rules: PolicyConfig) -> dict[str, Path]:
    """Return the annotation part of each model that the policy names. Raises AnnotationMissingError."""
    names = [*rules.scorers.values(), rules.tags.tagger, rules.sentences.captioner]
    paths = {name: workspace.annotations(name) / part.name for name in dict.fromkeys(names) if name}
    for name, path in paths.items():
        if not path.is_file():
            raise AnnotationMissingError(f"{path}: missing; run `python -m captioning annotate --models {name}` first")
    return paths


def read_labels(workspace: Workspace, tagger: str) -> tuple[pa.Table, str]:
    """Return the label table of a tagger and the digest of the model it belongs to. Raises AnnotationMissingError."""
    path = workspace.annotations(tagger) / LABELS_FILE
    if not path.is_file():
        raise AnnotationMissingError(f"{path}: missing; run `python -m captioning annotate --models {tagger}` first")
    return read_part(path), part_metadata(path).get("model_digest", "")


def check_model(workspace: Workspace, part: Path, tagger: str, *, model_digest: str) -> None:
    """Raise AnnotationMissingError when the tagger's part was made by another model than its labels."""
    path = workspace.annotations(tagger) / part.name
    if part_metadata(path).get("model_digest", "") != model_digest:
        raise AnnotationMissingError(
            f"{path}: made by another model than {LABELS_FILE}; run "
            f"`python -m captioning annotate --models {tagger}` until all parts are current"
        )


def check_revisions(workspace: Workspace, parts: Sequence[Path], rules: PolicyConfig) -> None:
    """Raise AnnotationMissingError when one model's annotations of these kept parts are of two revisions or settings.

    So it is when `annotate` was stopped before it had replaced all; a threshold cannot hold for both.
    """
    first: dict[str, tuple[Path, str]] = {}
    for part in parts:
        for name, path in annotation_parts(workspace, part, rules).items():
            digest = part_metadata(path).get("model_digest", "")
            known, expected = first.setdefault(name, (path, digest))
            if digest != expected:
                raise AnnotationMissingError(
                    f"{path}: made by another model, or with other settings, than {known.name} beside it; run "
                    f"`python -m captioning annotate --models {name}` until all parts are current"
                )


def policy_digest(config: CaptioningConfig, rules: PolicyConfig) -> str:
    """Return the digest of everything in the config that captions depend on, tables of tags included."""
    datasets = {name: source.dataset or name for name, source in config.sources.items()}
    return digest_of([_VERSION, rules.model_dump(mode="json"), config.model_dump(mode="json")["periods"], datasets])


def input_digest(workspace: Workspace, part: Path, rules: PolicyConfig) -> list[str]:
    """Return what identifies the rows of the part and of its annotations."""
    paths = [part, *annotation_parts(workspace, part, rules).values()]
    return [fact for path in paths for fact in _content_of(path)]


def _content_of(part: Path) -> list[str]:
    """Return what identifies the rows of a part: its digest, and for annotations which rows have a result."""
    facts = part_metadata(part)
    if "made_from" not in facts:
        raise DamagedPartError(f"{part}: says not what it was made from; delete it and run its stage again")
    return [facts["made_from"], facts.get("statuses", "")]


def _aligned(path: Path, keys: pa.ChunkedArray) -> pa.Table:
    """Return the annotation in the order of `keys`. Raises AnnotationMissingError when one of them has no row."""
    annotation = read_part(path)
    if annotation.column("key").equals(keys):
        return annotation
    places = pc.index_in(keys, value_set=annotation.column("key"))
    if places.null_count:
        first = keys.filter(pc.is_null(places))[0].as_py()
        raise AnnotationMissingError(
            f"{path}: {places.null_count:,} of {len(keys):,} keys have no row, first {first}; "
            "run `python -m captioning annotate` first"
        )
    return annotation.take(places)
