"""Write the repaired copies of a data set: pictures, captions, concepts.toml, and fix.json, which says what was done.

    DIR/concepts.toml
    DIR/fix.json
    DIR/CONCEPT/[folders as they were/]NAME.png (or the file as it was, when nothing had to be done)

Originals are read only. A copy whose original, caption and settings are the same as last time is left as it is; one
whose original is gone is removed, if it is still what was written.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sharding.config import ConfigError
from sharding.files import LOCK, locked, write_bytes, write_json
from training.config.concepts import ConceptConfig
from training.dreambooth.concepts.imported import Imported
from training.dreambooth.doctor.examination import Examination
from training.dreambooth.doctor.fix.jobs import Job, jobs_of
from training.dreambooth.doctor.fix.repair import finish
from training.dreambooth.doctor.fix.upscale import Upscaler
from training.dreambooth.doctor.rules import FixRules

RECORD, CONCEPTS = "fix.json", "concepts.toml"
_VERSION = 1


@dataclass(frozen=True)
class Copied:
    """One picture's copies. files: below the folder, pictures and captions, each with its SHA-256."""

    concept: str
    sources: tuple[str, ...]
    files: dict[str, str]
    steps: tuple[str, ...]
    fingerprint: str
    is_new: bool = True
    """False: it was there already."""


@dataclass(frozen=True)
class FixReport:
    """What `write_copies` did. left_out: (file, why)."""

    folder: Path
    copied: tuple[Copied, ...]
    left_out: tuple[tuple[Path, str], ...]
    removed: tuple[str, ...]

    def text(self) -> str:
        """Return a line for each picture that was changed, left out or removed, and one that counts."""
        lines = [
            f"fixed {one.concept}: {_names(one.sources)}: {'; '.join(one.steps)}" for one in self.copied if one.steps
        ]
        lines += [f"left out {path}: {why}" for path, why in self.left_out]
        lines += [f"removed {name}: its original is gone or it is called otherwise now" for name in self.removed]
        new = sum(one.is_new for one in self.copied)
        changed = sum(bool(one.steps) for one in self.copied)
        files = sum(len(one.files) for one in self.copied)
        lines.append(
            f"{self.folder}: {len(self.copied):,} pictures, {changed:,} of them repaired, {new:,} written now; "
            f"{files:,} files; {len(self.left_out):,} left out; train with {self.folder / CONCEPTS}"
        )
        return "\n".join(lines) + "\n"


def write_copies(examination: Examination, folder: Path, *, upscaler: Upscaler | None = None) -> FixReport:
    """Write the copies of all concepts that were examined, by the settings of its rules (`fix`).

    Raises ConfigError when the folder is not one of copies, or overlaps an original's; ImageError.
    """
    settings = examination.rules.fix
    _refuse(folder, [patient.concept for patient in examination.patients])
    with locked(folder):
        known = _read_record(folder)
        before = list(known.values())
        copied: list[Copied] = []
        left_out: list[tuple[Path, str]] = []
        for patient in examination.patients:
            (folder / patient.name).mkdir(parents=True, exist_ok=True)
            jobs, broken = jobs_of(patient, settings)
            left_out += [(picture.path, picture.error) for picture in broken]
            for job in jobs:
                copied.append(_copy(job, folder, known, settings, upscaler))
                if copied[-1].is_new:
                    known[_key(copied[-1])] = copied[-1]
                    _write_record(folder, list(known.values()), settings)
        removed = _remove_stale(folder, before, copied)
        _write_record(folder, copied, settings)
        concepts = [patient.concept for patient in examination.patients]
        _write_if_other(folder / CONCEPTS, _toml(concepts, folder).encode())
    return FixReport(folder, tuple(copied), tuple(left_out), tuple(removed))


def _copy(job: Job, folder: Path, known: dict[str, Copied], settings: FixRules, upscaler: Upscaler | None) -> Copied:
    fingerprint = job.fingerprint(settings, upscaler)
    sources = tuple(str(path) for path in job.sources)
    old = known.get(f"{job.concept}/{sources}")
    if old is not None and old.fingerprint == fingerprint and _is_there(folder, old):
        return Copied(job.concept, sources, old.files, old.steps, fingerprint, is_new=False)
    files: dict[str, str] = {}
    told: list[str] = []
    for one in finish(job.opened(), settings, upscaler=upscaler, keep=job.keep, ends=job.ends):
        source = job.sources[0]
        data = _png(one.image) if one.steps else source.read_bytes()
        suffix = ".png" if one.steps else source.suffix.lower()
        base = Path(job.concept, job.stem + one.end)
        _write(folder, f"{base.as_posix()}{suffix}", data, files)
        if job.caption.is_file():
            _write(
                folder,
                f"{base.as_posix()}{job.caption.name.removeprefix(source.stem)}",
                job.caption.read_bytes(),
                files,
            )
        told += [f"{base.name}: {', '.join(one.steps)}"] if one.end else one.steps
    return Copied(job.concept, sources, files, tuple(told), fingerprint)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


def _write(folder: Path, name: str, data: bytes, files: dict[str, str]) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, data)
    files[name] = hashlib.sha256(data).hexdigest()


def _write_if_other(path: Path, data: bytes) -> None:
    if not path.is_file() or path.read_bytes() != data:
        write_bytes(path, data)


def _is_there(folder: Path, copied: Copied) -> bool:
    return all(_has(folder / name, sha256) for name, sha256 in copied.files.items())


def _has(path: Path, sha256: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def _remove_stale(folder: Path, before: Sequence[Copied], now: Sequence[Copied]) -> list[str]:
    """Remove files of earlier copies that nothing now stands for; what somebody has changed since stays."""
    wanted = {name for one in now for name in one.files}
    removed = []
    for one in before:
        for name, sha256 in one.files.items():
            if name not in wanted and _has(folder / name, sha256):
                (folder / name).unlink()
                removed.append(name)
    return sorted(removed)


def _refuse(folder: Path, concepts: Sequence[ConceptConfig]) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--fix {folder}: is a file; name a folder for the copies")
    foreign = folder.is_dir() and any(path.name != LOCK for path in folder.iterdir())
    if foreign and not (folder / RECORD).is_file():
        raise ConfigError(f"--fix {folder}: holds other files; name an empty or a new folder")
    here = folder.resolve()
    for concept in concepts:
        source = Path(concept.folder).resolve()
        if (
            here == source
            or source in here.parents
            or source == here / concept.name
            or here / concept.name in source.parents
        ):
            raise ConfigError(
                f"--fix {folder}: overlaps {concept.folder}, whose originals stay as they are; name another"
            )


def _read_record(folder: Path) -> dict[str, Copied]:
    """Return earlier copies by concept and sources; an empty record is written where there is none."""
    path = folder / RECORD
    if not path.is_file():
        write_json(path, {"version": _VERSION, "copies": []})
        return {}
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        copies = [
            Copied(one["concept"], tuple(one["sources"]), one["files"], tuple(one["steps"]), one["fingerprint"])
            for one in record["copies"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a record of copies ({error!r}); name a new folder") from error
    return {_key(one): one for one in copies}


def _write_record(folder: Path, copies: Sequence[Copied], settings: FixRules) -> None:
    listed = [
        {
            "concept": one.concept,
            "sources": list(one.sources),
            "files": one.files,
            "steps": list(one.steps),
            "fingerprint": one.fingerprint,
        }
        for one in copies
    ]
    record = {"version": _VERSION, "settings": settings.model_dump(mode="json"), "copies": listed}
    _write_if_other(folder / RECORD, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())


def _key(copied: Copied) -> str:
    return f"{copied.concept}/{copied.sources}"


def _toml(concepts: Sequence[ConceptConfig], folder: Path) -> str:
    moved = [one.model_copy(update={"folder": (folder / one.name).absolute()}) for one in concepts]
    return Imported(tuple(moved), "", ()).toml()


def _names(sources: Sequence[str]) -> str:
    return " + ".join(Path(source).name for source in sources)
