"""The pictures in a folder, each with the caption beside it: what can be trained, and what is broken or odd."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sharding.images import EXTENSIONS, ImageError, ImageFacts, decode_rgb, probe
from training.dreambooth.doctor.captions import read_caption
from training.errors import BrokenDataError

_SHOWN = 5


@dataclass(frozen=True)
class Picture:
    """A picture that can be decoded. caption: what stands beside it, stripped; None when there is no file."""

    root: Path
    path: str
    """Relative to root, "/" separated."""
    sha256: str
    num_bytes: int
    facts: ImageFacts
    caption: str | None

    @property
    def place(self) -> Path:
        """Where the file lies."""
        return self.root / self.path


@dataclass(frozen=True)
class Found:
    """What is in a folder."""

    pictures: tuple[Picture, ...]
    """By path; of files with the same bytes the first."""
    broken: tuple[str, ...]
    """Pictures that cannot be used, each with its reason."""
    notes: tuple[str, ...]


def read_folder(
    root: Path,
    *,
    caption_extension: str,
    is_known: Callable[[str], bool],
    without: Sequence[Path] = (),
) -> Found:
    """Read the pictures in a folder and below. Hidden files and folders are passed over.

    is_known: tells of a SHA-256 that its picture was decoded once; all others are decoded here. without: folders below
    that are somebody else's. Raises FileNotFoundError for a folder that is not there, BrokenDataError for a caption
    that is not UTF-8.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    first_with: dict[str, str] = {}
    pictures, broken, doubled = [], [], []
    paths = list(_pictures_below(root, without))
    for path in paths:
        name = path.relative_to(root).as_posix()
        try:
            data = path.read_bytes()
            sha256 = hashlib.sha256(data).hexdigest()
            facts = probe(data)
            if not is_known(sha256):
                decode_rgb(data)
        except (ImageError, OSError) as error:
            broken.append(f"{path}: {error}")
            continue
        if sha256 in first_with:
            doubled.append(f"{path}: the same bytes as {first_with[sha256]}; left out")
            continue
        first_with[sha256] = name
        caption = _caption(path.with_suffix(caption_extension))
        pictures.append(Picture(root, name, sha256, len(data), facts, caption))
    notes = (*_some(doubled), *_some(_shared_captions(paths, caption_extension)))
    return Found(tuple(pictures), tuple(broken), notes)


def _pictures_below(root: Path, without: Sequence[Path]) -> Iterator[Path]:
    others = [folder.resolve() for folder in without if root.resolve() in folder.resolve().parents]
    for path in sorted(root.rglob("*")):
        is_hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if is_hidden or path.suffix.lower() not in EXTENSIONS or not path.is_file():
            continue
        if not any(path.resolve().is_relative_to(other) for other in others):
            yield path


def _caption(path: Path) -> str | None:
    caption = read_caption(path)
    if caption is not None and not caption.is_decodable:
        raise BrokenDataError(f"{path}: not UTF-8; save it as UTF-8 and pack again")
    return caption.text if caption is not None else None


def _some(notes: list[str]) -> list[str]:
    """Return notes of one kind, of many the first ones and how many more there are."""
    return [*notes[:_SHOWN], *[f"… {len(notes) - _SHOWN:,} more like this"] * (len(notes) > _SHOWN)]


def _shared_captions(paths: Sequence[Path], caption_extension: str) -> list[str]:
    by_caption: dict[Path, list[str]] = {}
    for path in paths:
        by_caption.setdefault(path.with_suffix(caption_extension), []).append(path.name)
    return [
        f"{caption}: {' and '.join(names)} share this caption"
        for caption, names in by_caption.items()
        if len(names) > 1 and caption.is_file()
    ]
