"""Write one shard of a chunk from raw files: the work of one worker of `pack`.

Reads each source file once, checks that it is still the file that was scanned, stores it (`stored_image`), and leaves
a hidden record of the finished shard, so that a killed pack goes on where it was.
Which samples belong to the shard is decided elsewhere (`plan`, `pack`).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import pyarrow as pa

from sharding.chunk import Sample, ShardFile, write_shard
from sharding.files import read_file, sha256_file
from sharding.images import BrokenFractionError, ImageError
from sharding.packing.stored_image import (
    ImagePolicy,
    StoredImage,
    mask_of_alpha,
    mask_of_file,
    mask_path,
    stored_image,
)
from sharding.schema import DROPS, INDEX, SCHEMA_VERSION, TAG_CATEGORIES, drop_row
from sharding.tables import is_current, part_metadata, read_part, write_part

BUILDING = ".building"
"""Hidden folder of a chunk: records of the finished shards of a pack that is under way."""
_CUSTOM_FACTS = ("artist_name", "vn_name", "vn_short")
_TAG_ORDER = ("character", "copyright", "artist", "general", "meta")


@dataclass(frozen=True)
class ShardTask:
    """One shard to write. rows: kept record + plan + caption of each sample, in order."""

    folder: Path
    number: int
    rows: pa.Table
    roots: Mapping[str, Path]
    """Folder of each source."""
    images: ImagePolicy
    masks: Mapping[str, Path | Literal["alpha"]] = field(default_factory=dict)
    """Of each source that has them: a folder, or the pictures' own alpha."""
    bad_masks: str = "drop"

    @property
    def record_path(self) -> Path:
        return self.folder / BUILDING / f"shard-{self.number:05d}.parquet"


@dataclass(frozen=True)
class FinishedShard:
    """A shard on disk. shard is None when every sample was dropped."""

    shard: ShardFile | None
    rows: pa.Table
    """INDEX."""
    drops: pa.Table
    """DROPS."""


def pack_shard(task: ShardTask) -> FinishedShard:
    """Write the shard of `task`, or take over the one that an earlier, killed pack finished from the same inputs."""
    made_from = _digest(task)
    if (finished := _read_record(task, made_from)) is not None:
        return finished
    drops: list[dict[str, Any]] = []
    shard, rows = write_shard(task.folder, task.number, _samples(task, drops))
    if not rows:
        (task.folder / shard.path).unlink()
    finished = FinishedShard(
        shard=shard if rows else None,
        rows=pa.Table.from_pylist(rows, schema=INDEX),
        drops=pa.Table.from_pylist(drops, schema=DROPS),
    )
    metadata = {
        "shard": json.dumps(asdict(shard) if rows else None),
        "drops": json.dumps(drops, ensure_ascii=False),
    }
    write_part(task.record_path, finished.rows, made_from=made_from, metadata=metadata)
    return finished


def _read_record(task: ShardTask, made_from: str) -> FinishedShard | None:
    if not is_current(task.record_path, made_from):
        return None
    metadata = part_metadata(task.record_path)
    raw = json.loads(metadata["shard"])
    shard = ShardFile(**raw) if raw is not None else None
    if shard is not None:
        path = task.folder / shard.path
        if not path.exists() or sha256_file(path) != shard.sha256:
            return None
    drops = pa.Table.from_pylist(json.loads(metadata["drops"]), schema=DROPS)
    return FinishedShard(shard, read_part(task.record_path).cast(INDEX).replace_schema_metadata(None), drops)


def _digest(task: ShardTask) -> str:
    roots = {name: str(root) for name, root in task.roots.items()}
    masks = [{name: str(masks) for name, masks in task.masks.items()}, task.bad_masks]
    facts = [SCHEMA_VERSION, task.number, roots, masks, asdict(task.images), task.rows.to_pylist()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=_jsonable).encode()).hexdigest()


def _jsonable(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.hex()
    raise TypeError(f"{type(value).__name__} is not JSON")


def _samples(task: ShardTask, drops: list[dict[str, Any]]) -> Iterator[Sample]:
    for row in task.rows.to_pylist():
        try:
            yield _sample(row, task)
        except ImageError as error:
            drops.append(drop_row(row, stage="pack", reason=error.reason, detail=error.detail))


def _sample(row: Mapping[str, Any], task: ShardTask) -> Sample:
    """Read and, where needed, encode one picture. Raises ImageError when it cannot be used."""
    data = _read_source(task.roots[row["source"]], row)
    stored = stored_image(data, row, task.images)
    mask = _mask(data, row, stored, task)
    sha256 = row["sha256"] if stored.is_unchanged else hashlib.sha256(stored.data).hexdigest()
    width, height = stored.width, stored.height
    return Sample(
        key=row["key"],
        image_name=f"{row['key']}.{stored.extension}",
        image=stored.data,
        facts=_facts(row, width=width, height=height, image_sha256=sha256),
        caption=row["text"],
        row={
            "width": width,
            "height": height,
            "groups": row["groups"],
            "dataset": row["dataset"],
            "period": row["period"],
            "repeats": row["repeats"],
            "loss_weight": row["loss_weight"],
            "sha256": sha256,
        },
        mask=mask,
    )


def _mask(data: bytes, row: Mapping[str, Any], stored: StoredImage, task: ShardTask) -> bytes:
    """Return the sample's mask, or b"" when it has none.

    Raises ImageError (`bad_mask`), or BrokenFractionError when the settings say that bad masks stop.
    """
    masks = task.masks.get(row["source"])
    if masks is None:
        return b""
    if masks == "alpha":
        return mask_of_alpha(data, stored) if row["has_alpha"] else b""
    path = mask_path(Path(masks), row["path"])
    try:
        return mask_of_file(path.read_bytes(), row, stored)
    except FileNotFoundError:
        return b""
    except (OSError, ImageError) as error:
        if task.bad_masks == "error":
            raise BrokenFractionError(f'{path}: {error}; replace it, or set pack.bad_masks = "drop"') from error
        raise error if isinstance(error, ImageError) else ImageError("bad_mask", f"{path}: {error}") from error


def _read_source(root: Path, row: Mapping[str, Any]) -> bytes:
    path = root / PurePosixPath(row["path"])
    try:
        data = read_file(root, row["path"])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageError("missing_since_scan", f"{path} is gone") from error
    except OSError as error:
        raise ImageError("unreadable", f"{path}: {error}") from error
    actual = hashlib.sha256(data).hexdigest()
    if actual != row["sha256"]:
        raise ImageError("changed_since_scan", f"SHA-256 is {actual[:16]}…, the manifest says {row['sha256'][:16]}…")
    return data


def _facts(row: Mapping[str, Any], *, width: int, height: int, image_sha256: str) -> dict[str, Any]:
    """Return KEY.json: flat, the same names and types for every sample, no null, no NaN."""
    created_at: datetime | None = row["created_at"]
    lists = {f"tags_{name}": list(row[f"tags_{name}"] or ()) for name in TAG_CATEGORIES}
    custom = dict(row["custom"] or ())
    facts: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "key": row["key"],
        "status": "success",
        "error_message": "",
        "caption": row["text"],
        "width": width,
        "height": height,
        "original_width": row["width"],
        "original_height": row["height"],
        "image_size": [width, height],
        "sha256": row["sha256"],
        "image_sha256": image_sha256,
        "exif": "{}",
        "dataset": row["dataset"],
        "source": row["source"],
        "source_path": row["path"],
        "file_ext": PurePosixPath(row["path"]).suffix.removeprefix(".").lower(),
        "file_size": row["num_bytes"],
        "created_at": created_at.astimezone(UTC).isoformat() if created_at is not None else "",
        "year": created_at.year if created_at is not None else 0,
        "period": row["period"],
        "rating": row["rating"] or "",
        "tags": ", ".join(tag for name in _TAG_ORDER for tag in lists[f"tags_{name}"]),
        **lists,
        **{name: str(custom.pop(name, "") or "") for name in _CUSTOM_FACTS},
    }
    return facts | {f"custom_{name}": str(value or "") for name, value in sorted(custom.items())}
