"""Upload a verified export with its card to repositories of the Hugging Face hub: `training export --push REPO`.

A repository gets one commit, after all its files are there: nobody finds half a model. What a broken upload has sent is
not sent again when the same command is run again. The token comes from the environment variable HF_TOKEN only, and is
in no message and no file. A repository that is made here is private.
"""

import filecmp
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharding.config import ConfigError
from sharding.files import TEMPORARY_MARK, size_text
from training.errors import RemoteError

logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "HF_TOKEN"
DIFFUSERS_FOLDER, DECODER_FOLDER = "diffusers", "diffusers-decoder"
CARD = "README.md"


class PushError(RemoteError):
    """The hub did not take a file, or was not reached."""


@dataclass(frozen=True)
class PushFile:
    """A file here, and its name in the repository."""

    path: Path
    name: str

    @property
    def num_bytes(self) -> int:
        return self.path.stat().st_size


@dataclass(frozen=True)
class Push:
    """What goes into one repository."""

    repository: str
    files: Sequence[PushFile]

    def text(self) -> str:
        """Return it in lines."""
        lines = [f"{self.repository}: {len(self.files):,} files, {size_text(sum(one.num_bytes for one in self.files))}"]
        return "\n".join([*lines, *(f"  {one.name}  {size_text(one.num_bytes)}" for one in self.files)])


def require_repository(name: str, option: str) -> None:
    """Raise ConfigError for a name that is no `OWNER/NAME`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"{option} {name!r}: not a repository's name ({error})") from error
    if "/" not in name:
        raise ConfigError(f"{option} {name!r}: give the owner, too, as in OWNER/{name}")


def require_token() -> str:
    """Return the token. Raises ConfigError without one."""
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if not token:
        raise ConfigError(f"{TOKEN_VARIABLE}: not set; put a token with write access into this environment variable")
    return token


def pushes_of(output: Path, repository: str, decoder_repository: str | None) -> list[Push]:
    """Return what an export's folder holds for each repository: its diffusers folder lies at the top there.

    Raises ValueError for files that clash or are damaged, FileNotFoundError without weights.
    """
    found: dict[str, Path] = {}
    folders = (output / DIFFUSERS_FOLDER, output)
    for folder in folders:
        for path in _files(folder, left_out=(DIFFUSERS_FOLDER, DECODER_FOLDER) if folder == output else ()):
            name = path.relative_to(folder).as_posix()
            if name in found and name != CARD and not filecmp.cmp(found[name], path, shallow=False):
                raise ValueError(f"{path} and {found[name]} would have the same name in {repository}; remove one")
            found[name] = path
    pushes = [_checked(repository, found)]
    if decoder_repository is not None:
        folder = output / DECODER_FOLDER
        own = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
        pushes.append(_checked(decoder_repository, own))
    return pushes


def _files(folder: Path, left_out: Sequence[str] = ()) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        is_hidden = any(part.startswith(".") or TEMPORARY_MARK in part for part in parts)
        if path.is_file() and not is_hidden and parts[0] not in left_out:
            yield path


def _checked(repository: str, files: dict[str, Path]) -> Push:
    """Look whether each file can be read as what it is; values were compared when they were exported."""
    from safetensors import SafetensorError, safe_open

    if not any(name.endswith((".safetensors", ".ckpt")) for name in files):
        raise FileNotFoundError(
            f"nothing to push to {repository}: no weights are exported; there are {len(files)} files"
        )
    for name, path in files.items():
        try:
            if name.endswith(".safetensors"):
                with safe_open(path, framework="np"):
                    pass
            elif name.endswith(".json"):
                json.loads(path.read_text(encoding="utf-8"))
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path}: damaged ({error}); export again") from error
    return Push(repository, [PushFile(files[name], name) for name in sorted(files)])


def push_all(pushes: Sequence[Push], *, token: str, message: str, api: Any = None) -> Iterator[str]:
    """Upload to one repository after the other; yield a line each.

    api: a `huggingface_hub.HfApi`, for tests. Raises PushError; run again, it goes on where it was.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    hub = api or HfApi(token=token)
    for push in pushes:
        with _naming(push.repository, token):
            hub.create_repo(push.repository, exist_ok=True, private=True, repo_type="model")
            operations = []
            for number, file in enumerate(push.files, start=1):
                logger.info(
                    "%s: %d of %d, %s (%s)",
                    push.repository, number, len(push.files), file.name, size_text(file.num_bytes),
                )  # fmt: skip
                operations.append(CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=str(file.path)))
                hub.preupload_lfs_files(push.repository, operations[-1:], repo_type="model")
            commit = hub.create_commit(push.repository, operations, commit_message=message, repo_type="model")
        yield f"{push.repository}: {len(push.files):,} files, {commit.commit_url}"


@contextmanager
def _naming(repository: str, token: str) -> Iterator[None]:
    """Turn what the hub's client raises into a PushError that says what to do, without the token."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        is_network = isinstance(error, HfHubHTTPError | OSError) or type(error).__module__.partition(".")[0] == "httpx"
        if not is_network:
            raise
        said = str(error).replace(token, "…").strip().splitlines()
        why = f"{type(error).__name__}: {said[0] if said else status}"
        if status in (401, 403):
            what = f"{TOKEN_VARIABLE} has no write access there ({why}); make a token with it"
        else:
            what = f"{why}; run the same command again: what is uploaded is not sent again"
        raise PushError(f"push to {repository}: {what}") from None
