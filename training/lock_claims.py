"""The numbered claims behind a run's lock: files made with link(), which only one process can win.

    lock            who holds it, as JSON; there exactly while it is held
    fence/000017    the claim: `lock` is a second name of the highest one. Its mtime is the heartbeat
    fence/000017.released

The holder is whoever made the claim with the highest number. Of two processes that want number 18 one gets it; that
holds on local disks, NFS and Lustre alike, and needs no lock daemon. (Where there are no hard links: exclusive
creation.) A claim is never changed, and the highest never deleted, so numbers only grow. Which claims count is read
from a listing of the folder, which NFS answers freshly, unlike a look-up by name.
"""

import errno
import json
import os
import socket
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from sharding.files import fsync_folder
from training.launch_identity import Launch

_RELEASED = ".released"
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@dataclass(frozen=True)
class Holder:
    """The contents of a claim, and of `lock`."""

    number: int
    launch: Launch
    since: str
    """UTC."""
    heartbeat_seconds: float

    def __str__(self) -> str:
        launch = self.launch
        job = f", Slurm job {launch.slurm_job_id} restart {launch.slurm_restart_count}" if launch.slurm_job_id else ""
        return f"process {launch.pid} on {launch.host}{job}, since {self.since}"


class Claims:
    """The claims on the lock at `lock_path`. Making one touches nothing."""

    def __init__(self, lock_path: Path) -> None:
        self.lock_path = lock_path
        self.folder = lock_path.with_name("fence")

    def path(self, number: int) -> Path:
        """Return the file of a claim."""
        return self.folder / f"{number:06d}"

    def highest(self) -> tuple[int, bool]:
        """Return the highest claim's number (0: none) and whether it was released."""
        names = {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()
        number = max((int(name) for name in names if name.isdecimal()), default=0)
        return number, self.path(number).name + _RELEASED in names

    def read(self, number: int) -> Holder | None:
        """Return a claim's contents; None when it is gone or not yet whole (possible without hard links only)."""
        try:
            raw = json.loads(self.path(number).read_text(encoding="utf-8"))
            return Holder(**{**raw, "launch": Launch(**raw["launch"])})
        except (FileNotFoundError, json.JSONDecodeError, TypeError, KeyError):
            return None

    def beat_time(self, number: int) -> float | None:
        """Return when the claim's holder last gave a heartbeat, in the file system's seconds; None when it is gone."""
        try:
            return self.path(number).stat().st_mtime
        except FileNotFoundError:
            return None

    def beat(self, number: int) -> None:
        """Give a heartbeat, on the file server's clock: the same for all hosts. Puts `lock` back when it is gone."""
        os.utime(self.path(number))
        if not self.lock_path.exists() or not self.lock_path.samefile(self.path(number)):
            self.show(number)

    def claim(self, holder: Holder) -> bool:
        """Make the claim; False when another process was faster."""
        target = self.path(holder.number)
        data = json.dumps(asdict(holder)).encode()
        draft = self.folder / f"draft-{holder.launch.host}-{os.getpid()}-{threading.get_ident()}"
        try:
            _write(draft, data, os.O_TRUNC)
            _link_or_create(draft, target, data)
        except FileExistsError:
            return False
        finally:
            draft.unlink(missing_ok=True)
        fsync_folder(self.folder)
        # A process that slept since it looked may have remade a number that was used and removed meanwhile.
        if self.highest()[0] != holder.number:
            target.unlink(missing_ok=True)
            return False
        return True

    def show(self, number: int) -> None:
        """Make `lock` a second name of the claim, for people and for its mtime; a copy where there are no hard links.

        Raises FileNotFoundError when the claim is gone.
        """
        path, claim = self.lock_path, self.path(number)
        draft = path.with_name(f"{path.name}.partial-{os.getpid()}")
        draft.unlink(missing_ok=True)
        try:
            os.link(claim, draft)
        except FileNotFoundError:
            raise
        except OSError:
            draft.write_bytes(claim.read_bytes())
        os.replace(draft, path)
        draft.unlink(missing_ok=True)  # replacing a link by a link to the same file leaves both
        fsync_folder(path.parent)

    def release(self, number: int) -> None:
        """Mark the claim as given back, and remove `lock`."""
        path = self.path(number)
        path.with_name(path.name + _RELEASED).touch()
        self.lock_path.unlink(missing_ok=True)
        fsync_folder(self.folder)
        fsync_folder(self.lock_path.parent)

    def remove_below(self, number: int) -> None:
        """Remove claims that a higher one has made worthless."""
        for path in self.folder.iterdir():
            if path.stem.isdecimal() and int(path.stem) < number:
                path.unlink(missing_ok=True)

    def clock(self) -> float:
        """Return the time on the clock that gives these files their mtime, in seconds since 1970."""
        probe = self.folder / f"clock-{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
        try:
            probe.touch()
            os.utime(probe)
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)


def _link_or_create(draft: Path, target: Path, data: bytes) -> None:
    """Make `target` with the draft's bytes at once. Raises FileExistsError when it is there already."""
    try:
        os.link(draft, target)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        _write(target, data, os.O_EXCL)


def _write(path: Path, data: bytes, flag: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | flag, 0o644)
    try:
        os.write(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
