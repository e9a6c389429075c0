"""Write files so that a reader sees either all of one or none of it.

Temporary name in the same folder, flush, fsync, `os.replace`, fsync of the folder.
Nothing here knows what is in a file.
"""

import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from sharding.sources import read_file as read_file  # for the other packages, which import only shared modules

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

TEMPORARY_MARK = ".partial-"
LOCK = ".lock"
"""Hidden file of a folder: who holds it (`locked`) may change what is in there."""
LEFT_OVER_SECONDS = 3600.0
"""Where several tasks write into a folder, temporary files older than this belong to none of them."""
_HASH_BLOCK_BYTES = 4 << 20


class DiskFullError(OSError):
    """The disk is full, or smaller than a forecast; the message says how much is needed and where."""

    def __str__(self) -> str:
        return str(self.strerror)  # without OSError's "[Errno 28]"


def unsupported_system() -> str:
    """Return why nothing is written on this system, and what to do; "" where all is well.

    Reading works: modules can be imported, and shards are read by offset, everywhere.
    """
    if sys.platform != "win32":
        return ""
    return "chunkline does not run on Windows (locks, signals and renames differ): use WSL2 (`wsl --install`) there"


def fsync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable. A no-op where folders cannot be opened (Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """Return the name that `path` is written under until it is complete; no other writer gets the same one.

    Random, because tasks on different machines share folders and may have the same process id.
    """
    return path.with_name(f"{path.name}{TEMPORARY_MARK}{os.getpid()}-{secrets.token_hex(4)}")


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Turn the error of a full disk, which names no file, into a DiskFullError that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise DiskFullError(
            errno.ENOSPC, f"disk full while writing {path}: free some space and run the same command again"
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path; on success fsync it and rename it to `path`, on failure remove it.

    For writers that want a name rather than a file object (Parquet, safetensors).
    Raises DiskFullError, naming `path`, when the disk fills up while writing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with naming_full_disk(path):
            yield temporary
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            os.replace(temporary, path)
            fsync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def open_replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file for writing bytes; it becomes `path` when the block ends without an error."""
    with replacing(path) as temporary, temporary.open("wb") as stream:
        yield stream
        stream.flush()


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with open_replacing(path) as stream:
        stream.write(data)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON: keys in the given order, two spaces, no NaN, a newline at the end."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


@contextmanager
def locked(folder: Path, *, dry_run: bool = False) -> Iterator[None]:
    """Hold the lock of `folder`; wait while another process, of any machine, holds it.

    A process that dies lets go. No lock is taken for a dry run and where nothing can be written; where the file system
    has no locks, a warning is all there is.
    """
    stream = None if dry_run else _open_lock(folder)
    if stream is None:
        yield
        return
    with stream:
        is_held = _lock(stream)
        try:
            yield
        finally:
            if (
                is_held and sys.platform != "win32"
            ):  # said aloud, because worker processes may have inherited the open file
                fcntl.flock(stream, fcntl.LOCK_UN)


def _open_lock(folder: Path) -> IO[bytes] | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / LOCK).open("ab")
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return None  # who only looks whether all is current may go on; a writer will be told
        raise


def _lock(stream: IO[bytes]) -> bool:
    if sys.platform == "win32":
        logger.warning("%s: no locks on Windows: let no two tasks do the same work", stream.name)
        return False
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.info("waiting for another process that holds %s", stream.name)
        fcntl.flock(stream, fcntl.LOCK_EX)
    except OSError as error:
        logger.warning("%s: no locks here (%s): let no two tasks do the same work", stream.name, error.strerror)
        return False
    return True


def remove_temporaries(folder: Path, *, min_age_seconds: float = 0.0) -> list[Path]:
    """Remove what killed writers left in `folder` (not below it) and return the names.

    Only the owner of a folder may call this without an age: another live writer's temporary file would go too.
    """
    removed = []
    for path in sorted(folder.glob(f"*{TEMPORARY_MARK}*")) if folder.is_dir() else []:
        try:
            age_seconds = time.time() - path.stat().st_mtime
        except FileNotFoundError:
            continue  # its writer has just finished it
        if min_age_seconds > 0 and age_seconds <= min_age_seconds:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        removed.append(path)
    return removed


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a JSON-able value, independent of dictionary order. Raises TypeError if it is not JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def size_text(num_bytes: int) -> str:
    """Return a number of bytes as people read it: `17.9 MB`."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:,.2f} {unit}"
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:,.0f} kB"


def free_bytes(folder: Path) -> int:
    """Return how many bytes are free on the disk of `folder`, which need not exist yet."""
    existing = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    return shutil.disk_usage(existing).free


def require_free_bytes(folder: Path, num_bytes: int, purpose: str) -> None:
    """Raise DiskFullError if the disk of `folder` has less than `num_bytes` free. `folder` need not exist yet."""
    free = free_bytes(folder)
    if free < num_bytes:
        raise DiskFullError(
            errno.ENOSPC,
            f"{purpose} needs {size_text(num_bytes)} in {folder}, {size_text(free)} are free there: "
            "free some space or choose another folder",
        )
