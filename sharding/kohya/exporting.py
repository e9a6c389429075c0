"""Write chunks as folders of pictures for kohya's sd-scripts: `python -m sharding export-kohya DATASET.toml OUT`.

    OUT/newest/0004/KEY.jpg, KEY.txt     pictures and captions
    OUT/newest/0004.json                 its in_json: {"/absolute/KEY.jpg": {"tags": …, "image_size": [w, h]}}
    OUT/newest/0004.masks/KEY.png        masks, where samples have one
    OUT/dataset_config.toml              all chunks of this call, with their repeats

The in_json has the one form that both of kohya's branches accept: absolute keys with ending (main refuses stems,
stable-cascade takes a folder of the same name for the image), one text per image (the branches join two in their own
ways), tags as one string, no train_resolution (which forbids bucket_no_upscale). Loss weights have no place in it.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from sharding.chunk import Chunk, ShardReader, list_chunks
from sharding.config import DatasetConfig
from sharding.files import (
    digest_of,
    remove_temporaries,
    require_free_bytes,
    sha256_file,
    size_text,
    temporary_name,
    write_bytes,
    write_json,
)
from sharding.reporting.questions import Questions, rows_of
from sharding.schema import MANIFEST, Workspace
from sharding.tables import list_parts

TextKey = Literal["tags", "caption"]
Link = Literal["copy", "hardlink"]
_DONE = ".exported.json"
"""In a chunk's folder, written last: the digest of what was exported."""


@dataclass(frozen=True)
class KohyaExport:
    """What one call of `export_kohya` did, or with is_dry_run would do."""

    out: Path
    num_chunks: int
    num_current: int
    num_images: int
    num_bytes: int
    """Of the shards of chunks that were not current."""
    num_linked: int
    num_masks: int
    num_weighted: int
    """Samples whose loss_weight is not 1, which kohya cannot be told."""
    is_dry_run: bool

    def summary(self) -> str:
        """Return what was written, and what could not be."""
        verb = "would be exported" if self.is_dry_run else "exported"
        lines = [
            f"{self.num_chunks - self.num_current:,} chunks {verb} to {self.out} ({self.num_images:,} images, "
            f"{size_text(self.num_bytes)}), {self.num_current:,} current"
        ]
        if self.num_linked:
            lines.append(f"{self.num_linked:,} pictures are hard links to the source's files")
        if self.num_masks:
            lines.append(f"{self.num_masks:,} masks beside the chunks in CHUNK.masks/")
        if self.num_weighted:
            lines.append(f"{self.num_weighted:,} samples have a loss_weight, which kohya cannot be told")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Form:
    """How pictures and texts are written."""

    text_key: TextKey
    link: Link
    seen_at: PurePosixPath
    """Where the trainer sees OUT."""


def export_kohya(
    config: DatasetConfig,
    workspace: Workspace,
    out: Path,
    *,
    chunks: Sequence[str] = (),
    text_key: TextKey = "tags",
    link: Link = "copy",
    seen_at: Path | None = None,
    dry_run: bool = False,
) -> KohyaExport:
    """Export chunks by name; without names all plain ones that may be trained. Finished ones are left alone.

    text_key: where the text stands in the in_json; kohya's --enable_wildcard loses what stands in tags alone.
    link: "hardlink" saves space where a picture was packed unchanged and its source file still holds those bytes.
    seen_at: the path of `out` on the machine that trains.

    Raises ValueError for an unknown chunk, for an `out` inside the workspace's chunks and for links across disks,
    ChunkError for a damaged chunk, DiskFullError before anything is written.
    """
    if out.absolute().is_relative_to(workspace.chunks.absolute()):
        raise ValueError(f"{out}: lies inside the workspace's chunks; choose a folder outside")
    chosen = _choose(workspace, chunks)
    form = _Form(text_key, link, PurePosixPath((seen_at or out).absolute().as_posix()))
    digests = {chunk.name: _digest(chunk, form) for chunk in chosen}
    stale = [chunk for chunk in chosen if not _is_done(out, chunk.name, digests[chunk.name])]
    num_bytes = sum(shard.num_bytes for chunk in stale for shard in chunk.info.shards)
    if not dry_run:
        require_free_bytes(out, num_bytes if link == "copy" else 0, "export-kohya")
    counts = [_export_chunk(config, workspace, chunk, out, form) for chunk in stale if not dry_run]
    if not dry_run and chosen:
        write_bytes(out / "dataset_config.toml", _dataset_config(out, chosen, form).encode())
    return KohyaExport(
        out=out,
        num_chunks=len(chosen),
        num_current=len(chosen) - len(stale),
        num_images=sum(chunk.info.num_samples for chunk in stale),
        num_bytes=num_bytes,
        num_linked=sum(linked for linked, _, _ in counts),
        num_masks=sum(masks for _, masks, _ in counts),
        num_weighted=sum(weighted for _, _, weighted in counts),
        is_dry_run=dry_run,
    )


def _choose(workspace: Workspace, names: Sequence[str]) -> list[Chunk]:
    known = {chunk.name: chunk for chunk in list_chunks(workspace.chunks, with_held_out=True)}
    if unknown := [name for name in names if name not in known]:
        some = ", ".join(list(known)[:5]) or "none"
        raise ValueError(f"--chunk {unknown[0]!r}: no such chunk in {workspace.chunks}; there are {some} …")
    if names:
        return [known[name] for name in dict.fromkeys(names)]
    chosen = [chunk for chunk in known.values() if not chunk.info.is_combined and not chunk.info.is_held_out]
    if not chosen:
        raise ValueError(f"{workspace.chunks}: there is no chunk to export; run `python -m sharding pack` first")
    return chosen


def _digest(chunk: Chunk, form: _Form) -> str:
    return digest_of([1, chunk.info.digest, form.text_key, form.link, str(form.seen_at)])


def _is_done(out: Path, name: str, digest: str) -> bool:
    if not (out / f"{name}.json").is_file():
        return False
    try:
        return bool(json.loads((out / name / _DONE).read_text(encoding="utf-8"))["digest"] == digest)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


# --- one chunk ---


def _export_chunk(
    config: DatasetConfig, workspace: Workspace, chunk: Chunk, out: Path, form: _Form
) -> tuple[int, int, int]:
    """Write a chunk and, last, that it is done; return how many pictures were linked, have a mask, have a weight."""
    rows = chunk.read_index().drop_columns(["groups"]).to_pylist()
    origins = _origins(config, workspace, chunk) if form.link == "hardlink" else {}
    num_linked = _write_files(chunk, rows, out / chunk.name, origins)
    for path in set(out.glob(f"{chunk.name}.repeats-*.json")) - {
        out / path for path in _metadata(chunk.name, rows, form)
    }:
        path.unlink()
    for name, entries in _metadata(chunk.name, rows, form).items():
        write_json(out / name, entries)
    write_json(out / chunk.name / _DONE, {"digest": _digest(chunk, form), "repeats": _repeats(rows)})
    return num_linked, sum(row["mask_bytes"] > 0 for row in rows), sum(row["loss_weight"] != 1 for row in rows)


def _write_files(
    chunk: Chunk, rows: Sequence[Mapping[str, Any]], folder: Path, origins: Mapping[str, Sequence[Path]]
) -> int:
    """Write pictures, texts and masks; return how many pictures were linked."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _DONE).unlink(missing_ok=True)
    remove_temporaries(folder)
    _remove_left_over(folder, rows)
    reader = ShardReader()
    num_linked = 0
    try:
        for row in rows:
            target, shard = folder / row["image_name"], chunk.shard_path(row["shard"])
            if _link_origin(origins.get(row["key"], ()), target, row):
                num_linked += 1
            elif not _holds(target, row):
                _put(target, reader.read(shard, row["image_offset"], row["image_bytes"]))
            _put(folder / f"{row['key']}.txt", row["caption"].encode())
            if row["mask_bytes"]:
                mask = folder.with_name(f"{folder.name}.masks") / f"{row['key']}.png"
                mask.parent.mkdir(exist_ok=True)
                _put(mask, reader.read(shard, row["mask_offset"], row["mask_bytes"]))
    finally:
        reader.close()
    if hasattr(os, "sync"):
        os.sync()  # once, instead of a flush for each of thousands of files
    return num_linked


def _put(path: Path, data: bytes) -> None:
    temporary = temporary_name(path)
    temporary.write_bytes(data)
    os.replace(temporary, path)


def _holds(path: Path, row: Mapping[str, Any]) -> bool:
    """Tell whether a picture is there already, from an export that was cut short."""
    if not path.is_file() or path.stat().st_size != row["image_bytes"]:
        return False
    sha256: str = row["sha256"]
    return sha256_file(path) == sha256


def _remove_left_over(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Remove pictures, texts and masks of keys that an earlier in_json names and the chunk no longer has."""
    try:
        named = json.loads(folder.with_name(f"{folder.name}.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return
    present = {row["image_name"] for row in rows}
    for name in sorted({PurePosixPath(key).name for key in named} - present):
        stem = PurePosixPath(name).stem
        for path in (folder / name, folder / f"{stem}.txt", folder.with_name(f"{folder.name}.masks") / f"{stem}.png"):
            path.unlink(missing_ok=True)


def _origins(config: DatasetConfig, workspace: Workspace, chunk: Chunk) -> Mapping[str, list[Path]]:
    """Return the source files by key."""
    manifest = rows_of(list_parts(workspace.manifest), MANIFEST)
    with Questions() as questions:
        keys = f"select key from {rows_of([chunk.index_path], MANIFEST)}"
        rows = questions.ask(f"select key, source, path from {manifest} where key in ({keys}) order by all")
    origins: dict[str, list[Path]] = {}
    for row in rows:
        if row["source"] in config.sources:
            origins.setdefault(row["key"], []).append(config.sources[row["source"]].root / PurePosixPath(row["path"]))
    return origins


def _link_origin(origins: Sequence[Path], target: Path, row: Mapping[str, Any]) -> bool:
    for origin in origins:
        if not _holds(origin, row):
            continue
        if target.exists() and target.samefile(origin):
            return True
        temporary = temporary_name(target)
        try:
            os.link(origin, temporary)
        except OSError as error:
            raise ValueError(
                f"{origin}: cannot be hard-linked to {target} ({error.strerror}); use --link copy"
            ) from error
        os.replace(temporary, target)
        return True
    return False


# --- what kohya reads ---


def _repeats(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    return sorted({row["repeats"] for row in rows})


def _metadata_files(name: str, repeats: Sequence[int]) -> dict[int, str]:
    """Return the in_json of each number of repeats: kohya repeats a whole in_json, not an image."""
    if len(repeats) == 1:
        return {repeats[0]: f"{name}.json"}
    return {number: f"{name}.repeats-{number}.json" for number in repeats}


def _metadata(name: str, rows: Sequence[Mapping[str, Any]], form: _Form) -> dict[str, dict[str, Any]]:
    """Return the in_json files of a chunk by path: always one with all images, which comes last."""
    folder = form.seen_at / name
    entries = {
        str(folder / row["image_name"]): {form.text_key: row["caption"], "image_size": [row["width"], row["height"]]}
        for row in rows
    }
    files = {
        path: {str(folder / row["image_name"]): entries[str(folder / row["image_name"])]
               for row in rows if row["repeats"] == number}
        for number, path in _metadata_files(name, _repeats(rows)).items()
    }  # fmt: skip
    return {**{path: part for path, part in files.items() if path != f"{name}.json"}, f"{name}.json": entries}


def _dataset_config(out: Path, chunks: Sequence[Chunk], form: _Form) -> str:
    lines = ["# For --dataset_config of kohya's fine tuning scripts; resolution and batch size come from there.", ""]
    lines += ["[[datasets]]"]
    for chunk in chunks:
        repeats = json.loads((out / chunk.name / _DONE).read_text(encoding="utf-8"))["repeats"]
        for number, path in _metadata_files(chunk.name, repeats).items():
            lines += [
                "",
                "[[datasets.subsets]]",
                f"image_dir = {json.dumps(str(form.seen_at / chunk.name), ensure_ascii=False)}",
                f"metadata_file = {json.dumps(str(form.seen_at / path), ensure_ascii=False)}",
                f"num_repeats = {number}",
            ]
    return "\n".join(lines) + "\n"
