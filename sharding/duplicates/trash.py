"""The trash of a desktop, as the FreeDesktop.org Trash specification 1.0 has it: files/NAME and info/NAME.trashinfo.

Finds the trash of a file's disk and writes and removes the notes beside trashed files. Moves nothing.
"""

import itertools
import os
import sys
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

from sharding.files import write_bytes


def trash_place(path: Path) -> Path:
    """Return a free place for a file in the trash of its disk: in the home's trash if that is on it.

    Raises OSError where there is no such trash: on macOS and Windows.
    """
    if sys.platform in ("darwin", "win32"):
        raise OSError("this system's trash is not supported; use --move")
    home = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    trash = home / "Trash"
    top = _top_folder(path)
    if _device(home) != _device(path):
        trash = top / f".Trash-{os.getuid()}"
    files = trash / "files"
    names = itertools.chain([path.name], (f"{path.stem}.{number}{path.suffix}" for number in itertools.count(2)))
    return next(files / name for name in names if not (files / name).exists() and not _info(files / name).exists())


def write_trash_info(place: Path, path: Path) -> None:
    """Note where the file that will be at `place` came from. A relative path on a disk's own trash."""
    top = place.parent.parent.parent
    is_home = place.parent.parent.name == "Trash"
    original = path if is_home else path.relative_to(top)
    now = datetime.now().astimezone().strftime("%Y-%m-%dT%H:%M:%S")
    text = f"[Trash Info]\nPath={quote(os.fsencode(original))}\nDeletionDate={now}\n"
    write_bytes(_info(place), text.encode())


def remove_trash_info(place: Path) -> None:
    """Remove the note of a file that has left the trash."""
    _info(place).unlink(missing_ok=True)


def _info(place: Path) -> Path:
    return place.parent.parent / "info" / f"{place.name}.trashinfo"


def _top_folder(path: Path) -> Path:
    """Return the folder where the disk of `path` is mounted."""
    return next(folder for folder in path.absolute().parents if os.path.ismount(folder))


def _device(path: Path) -> int:
    existing = next(folder for folder in [path, *path.absolute().parents] if folder.exists())
    return existing.stat().st_dev
