"""What a state's manifest.json says, and whether the files beside it are those that were saved.

It holds name, size and SHA-256 of every file, the global step, and a digest of all of it: its identity in the ledger.
"""

import json
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sharding.files import digest_of, sha256_file
from training.tensor_file import WrittenFile

MANIFEST = "manifest.json"
FACTS = "facts.json"
FORMAT = 1


class StateError(ValueError):
    """A state is missing, incomplete or damaged, or cannot be saved."""


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says."""

    global_step: int
    files: dict[str, WrittenFile] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """The state's identity in the ledger."""
        return digest_of(self._body())

    def _body(self) -> dict[str, Any]:
        files = {name: {"num_bytes": one.num_bytes, "sha256": one.sha256} for name, one in sorted(self.files.items())}
        return {"format": FORMAT, "global_step": self.global_step, "files": files}

    def encode(self) -> memoryview:
        return memoryview((json.dumps({**self._body(), "digest": self.digest}, indent=2) + "\n").encode())


def read_manifest(folder: Path) -> Manifest:
    """Read a state's manifest without looking at the files. Raises StateError."""
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        files = {name: WrittenFile(**one) for name, one in raw["files"].items()}
        manifest = Manifest(raw["global_step"], files)
        is_right = raw["digest"] == manifest.digest and raw["format"] == FORMAT
    except (FileNotFoundError, NotADirectoryError):
        raise StateError(f"{folder}: no {MANIFEST}: not a complete state") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise StateError(f"{path}: cannot be understood ({error}); the state is damaged") from error
    if not is_right:
        raise StateError(f"{path}: its digest does not fit; the state is damaged or of another version")
    return manifest


def verify_state(folder: Path, *, trusted: Container[str] = ()) -> Manifest:
    """Read every byte of a state and compare with its manifest. Raises StateError naming the first bad file.

    trusted: digests of states that this process has itself written and hashed, or verified before: of these only
    manifest and sizes are compared, since reading tens of gigabytes again at every save would tell nothing new.
    """
    manifest = read_manifest(folder)
    require_sizes(folder, manifest)
    if manifest.digest in trusted:
        return manifest
    for name, written in manifest.files.items():
        try:
            actual = sha256_file(folder / name)
        except OSError as error:
            raise StateError(f"{folder / name}: cannot be read ({error}); the state is damaged") from error
        if actual != written.sha256:
            raise StateError(f"{folder / name}: SHA-256 {actual[:12]}…, {written.sha256[:12]}… was saved; damaged")
    return manifest


def require_sizes(folder: Path, manifest: Manifest) -> None:
    """Raise StateError unless every file is there and as long as it was saved."""
    for name, written in manifest.files.items():
        try:
            num_bytes = (folder / name).stat().st_size
        except OSError:
            raise StateError(f"{folder / name}: missing; the state is damaged") from None
        if num_bytes != written.num_bytes:
            raise StateError(f"{folder / name}: {num_bytes:,} bytes, {written.num_bytes:,} were saved; damaged")
