"""Where a model's files are: a local folder or file, or the Hugging Face hub; and which version they are.

Nothing is loaded here.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from captioning.plugin import MissingExtraError, ModelError, ModelSettings
from sharding.files import digest_of, sha256_file

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class ModelFilesSettings(ModelSettings):
    """Settings of a model that is read from files."""

    revision: str = "main"
    """Branch, tag or commit on the hub; the commit it stands for is stored with every part."""
    licence: str = ""
    """As its publisher states it; stored with every part."""


class SubfolderSettings(ModelFilesSettings):
    """Settings of a model whose repository holds several, each in a folder of its own."""

    model: str
    """Folder with the model's files, or a hub id."""
    subfolder: str = ""
    """Folder of the model inside `model`; empty: its files lie there directly."""


def locate(
    model: str, *, revision: str, patterns: Sequence[str], key: str = "model", subfolder: str = ""
) -> tuple[Path, str]:
    """Return (folder, exact revision) of a local model folder, or of a hub model, downloading what `patterns` name.

    The revision of a local folder is a SHA-256 over the files that match, and `revision` is not read; that of a hub
    model is its commit and, if any, the subfolder. key: the setting that holds `model`, for messages.
    Raises ModelError when neither can be had.
    """
    folder = Path(model, subfolder)
    if Path(model).is_dir():
        files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
        if not files:
            raise ModelError(f"{key} = {str(folder)!r}: holds none of {', '.join(patterns)}; give a model of this kind")
        return folder, hash_files(files)
    if not _HUB_ID.fullmatch(model):
        raise ModelError(f"{key} = {model!r}: no such folder, and not a hub id OWNER/NAME")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", extras="caption,cpu") from error
    try:
        wanted = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in patterns]
        snapshot = Path(snapshot_download(model, revision=revision, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{key} = {model!r}: no such folder here, and {revision!r} of it cannot be had from the hub "
            f"({_first_line(error)}); download it once on a machine with access, or give the path of a local copy"
        ) from error
    return snapshot / subfolder, f"{snapshot.name}/{subfolder}" if subfolder else snapshot.name


def locate_file(path: str, *, revision: str, key: str) -> tuple[Path, str]:
    """Return (file, exact revision) of a local file, or of OWNER/NAME/PATH on the hub. Otherwise as `locate`.

    The revision of a file on the hub names the file, too: one commit may hold several heads.
    """
    local = Path(path)
    if local.is_file():
        return local, hash_files([local])
    parts = path.split("/")
    if len(parts) < 3 or not _HUB_ID.fullmatch("/".join(parts[:2])):
        raise ModelError(f"{key} = {path!r}: no such file, and not OWNER/NAME/FILE on the hub")
    inner = "/".join(parts[2:])
    folder, commit = locate("/".join(parts[:2]), revision=revision, patterns=[inner], key=key)
    if not (folder / inner).is_file():
        raise ModelError(f"{key} = {path!r}: {revision!r} of the repository has no file {inner}")
    return folder / inner, f"{commit}/{inner}"


def hash_files(files: Iterable[Path]) -> str:
    """Return `sha256:` and a digest over names and contents, independent of the folder they are in."""
    return "sha256:" + digest_of([[file.name, sha256_file(file)] for file in files])


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
