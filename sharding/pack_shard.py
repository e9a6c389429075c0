"""Write one shard of a chunk from raw files: the work of one worker of `pack`.

Reads each source file once, checks that it is still the file that was scanned, passes JPEG and PNG through unchanged
where it can, and leaves a hidden record of the finished shard, so that a killed pack goes on where it was.
Which samples belong to the shard is decided elsewhere (`plan`, `pack`).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from sharding.chunk import Sample, ShardFile, write_shard
from sharding.files import read_file, sha256_file
from sharding.images import ImageError, decode_rgb, encode_jpeg, encode_png, probe
from sharding.schema import DROPS, INDEX, SCHEMA_VERSION, TAG_CATEGORIES, drop_row
from sharding.tables import is_current, part_metadata, read_part, write_part

BUILDING = ".building"
"""Hidden folder of a chunk: records of the finished shards of a pack that is under way."""
_CUSTOM_FACTS = ("artist_name", "vn_name", "vn_short")
_TAG_ORDER = ("character", "copyright", "artist", "general", "meta")


@dataclass(frozen=True)
class ImagePolicy:
    """How pixels are written."""

    jpeg_quality: int
    lossless_as_png: bool
    max_pixels: int


@dataclass(frozen=True)
class ShardTask:
    """One shard to write. rows: kept record + plan + caption of each sample, in order."""

    folder: Path
    number: int
    rows: pa.Table
    roots: Mapping[str, Path]
    """Folder of each source."""
    images: ImagePolicy

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
    facts = [SCHEMA_VERSION, task.number, roots, asdict(task.images), task.rows.to_pylist()]
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
    if row["is_pass_through"]:
        image, extension, sha256 = data, "jpg" if row["format"] == "jpeg" else "png", row["sha256"]
        width, height = row["width"], row["height"]
    else:
        pixels = decode_rgb(data, max_pixels=task.images.max_pixels)
        width, height = pixels.size
        if task.images.lossless_as_png and probe(data, max_pixels=task.images.max_pixels).is_lossless:
            image, extension = encode_png(pixels), "png"
        else:
            image, extension = encode_jpeg(pixels, quality=task.images.jpeg_quality), "jpg"
        sha256 = hashlib.sha256(image).hexdigest()
    return Sample(
        key=row["key"],
        image_name=f"{row['key']}.{extension}",
        image=image,
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
    )


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
