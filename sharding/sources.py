"""Read the files of a source: plain ones, and members of tars, which are never unpacked.

The path of a member is the path of its tar, "/" and its name: `00000.tar/000000012.jpg`. Each process keeps the
indexes of the tars it has read last, by path, size and time. Knows nothing of pictures. Other packages import
`read_file` from `sharding.files`.
"""

import errno
import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

_BLOCK_BYTES = 512

Stamp = tuple[int, ...]
"""What changes when a file does: bytes and time; for a member also its place and the tar's bytes."""


class ChangingFileError(OSError):
    """A file changes while it is read."""


@dataclass(frozen=True)
class TarIndex:
    """What is in a tar."""

    members: Mapping[str, tuple[int, int]]
    """(offset, bytes) of each regular file by its name; of several with one name, the last."""
    problems: tuple[tuple[str, str, str], ...]
    """(name or "", reason, detail); reason: damaged_tar, not_utf8_name, unsafe_name."""


def read_file(root: Path, path: str = "", *, max_bytes: int | None = None) -> bytes:
    """Return the bytes of a file below `root` (of `root` itself without a path), or of a member of a tar there.

    max_bytes: read no more than these. A plain file that changes meanwhile is read once more, then is a
    ChangingFileError. Raises the same OSErrors for a member as for a file.
    """
    place = root / path
    for _ in range(2):
        try:
            with place.open("rb") as stream:
                before = os.fstat(stream.fileno())
                data = stream.read() if max_bytes is None else stream.read(max_bytes)
                after = os.fstat(stream.fileno())
        except (FileNotFoundError, NotADirectoryError):
            if (found := _tar_above(place)) is None:
                raise
            return _read_member(*found, max_bytes=max_bytes)
        is_whole = max_bytes is not None or len(data) == after.st_size
        if is_whole and (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns):
            return data
    raise ChangingFileError(
        errno.EBUSY, f"changes while it is read: {len(data):,} bytes read, {after.st_size:,} expected", str(place)
    )


def stamp_file(place: str) -> Stamp | None:
    """Return the stamp of a file or a member, or None for what cannot be looked at."""
    try:
        status = os.stat(place)  # noqa: PTH116  (five per picture: Path.stat is twice as slow)
    except (FileNotFoundError, NotADirectoryError):
        return _stamp_member(place)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _stamp_member(place: str) -> Stamp | None:
    if (found := _tar_above(place)) is None:
        return None
    tar, name = found
    try:
        status = tar.stat()
        offset, num_bytes = index_tar(tar).members[name]
    except (OSError, KeyError):
        return None
    return num_bytes, status.st_mtime_ns, offset, status.st_size


def index_tar(tar: Path) -> TarIndex:
    """Return what is in a tar. A damaged one gives what stands before the damage, and a problem. Raises OSError."""
    status = tar.stat()
    return _index(tar, status.st_size, status.st_mtime_ns)


def _tar_above(path: str | Path) -> tuple[Path, str] | None:
    """Return (tar, name of the member) for a path that leads into a tar."""
    if ".tar" not in str(path).lower():
        return None
    place = Path(path)
    for parent in place.parents:
        if parent.name.lower().endswith(".tar") and parent.is_file():
            return parent, place.relative_to(parent).as_posix()
    return None


def _read_member(tar: Path, name: str, *, max_bytes: int | None) -> bytes:
    if name not in (members := index_tar(tar).members):
        raise FileNotFoundError(errno.ENOENT, "no such member", f"{tar}/{name}")
    offset, num_bytes = members[name]
    wanted = num_bytes if max_bytes is None else min(num_bytes, max_bytes)
    with tar.open("rb", buffering=0) as stream:
        stream.seek(offset)
        data = stream.read(wanted)
    if len(data) != wanted:
        raise OSError(errno.EIO, f"the tar ends after {len(data):,} of its {wanted:,} bytes", f"{tar}/{name}")
    return data


@lru_cache(maxsize=16)
def _index(tar: Path, num_bytes: int, modified_ns: int) -> TarIndex:
    members: dict[str, tuple[int, int]] = {}
    problems: list[tuple[str, str, str]] = []
    with tar.open("rb") as stream:
        try:
            archive = tarfile.open(fileobj=stream, mode="r:")  # noqa: SIM115  (closed with its stream)
            while (member := archive.next()) is not None:
                if not member.isreg() or member.issparse():
                    continue
                if problem := _name_problem(member.name):
                    problems.append(problem)
                else:
                    members[PurePosixPath(member.name).as_posix()] = (member.offset_data, member.size)
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header it has read
        except (tarfile.TarError, EOFError, ValueError) as error:
            problems.append(("", "damaged_tar", str(error)))
        else:
            stream.seek(archive.offset)  # an unreadable header in the middle looks like the end to tarfile
            if stream.read(_BLOCK_BYTES).strip(b"\0"):
                problems.append(("", "damaged_tar", f"no readable header at byte {archive.offset:,}"))
    return TarIndex(members, tuple(problems))


def _name_problem(name: str) -> tuple[str, str, str] | None:
    try:
        name.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(name).decode("utf-8", "backslashreplace")
        return shown, "not_utf8_name", "the name is not UTF-8: rename it"
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        return name, "unsafe_name", "a member's name must not lead out of its tar"
    return None
