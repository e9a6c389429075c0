"""The run folder seen from all nodes: is it one folder, are renames whole, does the run's lock have one winner.

In a folder of its own beside what is there, removed at the end. The lock's race is run with `training.lock_claims`
itself. A process on each node takes part; in the race all do. Waiting reads listings, as a run does: network file
systems answer them more freshly than a look-up by name.
"""

import errno
import importlib.util
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from sharding.files import write_bytes
from training.launch_doctor.folder_findings import FolderFindings
from training.launch_doctor.team import Team
from training.launch_identity import this_launch
from training.lock_claims import Claims, Holder

_RENAMES, _BYTES, _RACES, _RACERS_ALONE = 100, 1 << 16, 5, 4
_TICK_SECONDS = 0.01
"""File times are those of the last tick of the kernel's clock."""


def anchor_of(root: Path) -> int:
    """Return how many levels above the run folder the first folder lies that is there; 0 for itself."""
    for level, folder in enumerate([root.absolute(), *root.absolute().parents]):
        if folder.is_dir():
            return level
    raise FileNotFoundError(f"{root}: no folder above it is there")


def look_at_folder(team: Team, root: Path, scouts: Sequence[int]) -> dict[str, object]:
    """Do this rank's part; return `FolderFindings` as JSON holds them, on rank 0 only.

    Raises OSError when nothing can be written there, SilentRanksError.
    """
    if not team.is_main:
        level, name = team.read("folder/name")
        _take_part(team, [root.absolute(), *root.absolute().parents][level] / name, scouts)
        return {}
    level = anchor_of(root)
    folder = [root.absolute(), *root.absolute().parents][level] / f".launch-doctor-{secrets.token_hex(4)}"
    (folder / "fence").mkdir(parents=True)
    try:
        team.post("folder/name", [level, folder.name])
        return asdict(_lead(team, folder, [scout for scout in scouts if scout != 0]))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _lead(team: Team, folder: Path, others: Sequence[int]) -> FolderFindings:
    write_bytes(folder / "from-0", b"here")
    team.post("folder/written", True)
    there, back = dict[str, float | None](), dict[str, float | None]()
    for scout in others:
        seconds = there[str(scout)] = team.read(f"folder/saw/{scout}", of=scout)
        limit = team.timeout_seconds / 4
        back[str(scout)] = None if seconds is None else _seconds_until_seen(folder, f"from-{scout}", limit=limit)
    reachable = [scout for scout in others if there[str(scout)] is not None]
    counts = [_renames(team, folder), *(team.read(f"folder/reads/{scout}", of=scout) for scout in reachable)]
    lost = [scout for scout in others if there[str(scout)] is None]
    num_racers = _RACERS_ALONE if team.world_size == 1 else team.world_size
    winners = _lead_races(team, folder, is_shared=not lost)
    claims = Claims(folder / "lock")
    asked = time.time()
    theirs = claims.clock()
    half = (time.time() - asked) / 2
    flock = _lead_flock(team, folder, reachable)
    num_reads, num_torn, num_gone = (sum(one[place] for one in counts) for place in range(3))
    return FolderFindings(
        there, back, num_reads, num_torn, num_gone, winners, num_racers, _has_links(folder), flock,
        (theirs - asked - half, half + _TICK_SECONDS),
    )  # fmt: skip


def _take_part(team: Team, folder: Path, scouts: Sequence[int]) -> None:
    if team.rank in scouts:
        team.read("folder/written")
        seconds = _seconds_until_seen(folder, "from-0", limit=team.timeout_seconds / 4)
        if seconds is not None:
            write_bytes(folder / f"from-{team.rank}", b"here")
        team.post(f"folder/saw/{team.rank}", seconds)
        if seconds is None:
            return
        team.read("folder/renaming")
        team.post(f"folder/reads/{team.rank}", _read_while(folder / "whole", lambda: not team.has("folder/renamed")))
    for number in range(1, _RACES + 1):
        if not team.read(f"folder/race/{number}"):
            break
        team.post(f"folder/raced/{number}/{team.rank}", _race(folder, number, racers=1))
    if team.rank in scouts:
        team.read("folder/flock")
        team.post(f"folder/flocked/{team.rank}", _try_flock(folder))


def _seconds_until_seen(folder: Path, name: str, *, limit: float) -> float | None:
    start = time.monotonic()
    while time.monotonic() - start < limit:
        with suppress(FileNotFoundError):
            if any(path.name == name for path in folder.iterdir()):
                return time.monotonic() - start
        time.sleep(0.002)
    return None


def _renames(team: Team, folder: Path) -> list[int]:
    path, own, is_over = folder / "whole", list[list[int]](), threading.Event()
    path.write_bytes(b"\0" * _BYTES)
    reader = threading.Thread(target=lambda: own.append(_read_while(path, lambda: not is_over.is_set())))
    reader.start()
    try:
        team.post("folder/renaming", True)
        for number in range(_RENAMES):
            draft = folder / "whole.new"
            draft.write_bytes(bytes([number % 256]) * _BYTES)
            os.replace(draft, path)
            time.sleep(0.001)
        team.post("folder/renamed", True)
    finally:
        is_over.set()
        reader.join()
    return own[0]


def _read_while(path: Path, goes_on: Callable[[], bool]) -> list[int]:
    num_reads = num_torn = num_gone = 0
    while goes_on():
        try:
            data = path.read_bytes()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE, errno.EACCES):
                raise
            num_gone += 1
            continue
        num_reads += 1
        num_torn += len(data) != _BYTES or data.count(data[:1]) != _BYTES
    return [num_reads, num_torn, num_gone]


def _lead_races(team: Team, folder: Path, *, is_shared: bool) -> list[int]:
    winners = list[int]()
    if not is_shared:
        team.post("folder/race/1", False)
        return winners
    for number in range(1, _RACES + 1):
        team.post(f"folder/race/{number}", True)
        own = _race(folder, number, racers=_RACERS_ALONE if team.world_size == 1 else 1)
        others = [team.read(f"folder/raced/{number}/{rank}", of=rank) for rank in range(1, team.world_size)]
        winners.append(own + sum(others))
    return winners


def _race(folder: Path, number: int, *, racers: int) -> int:
    claims, wins = Claims(folder / "lock"), list[bool]()
    holder = Holder(number=number, launch=this_launch(), since="", heartbeat_seconds=30.0)
    threads = [threading.Thread(target=lambda: wins.append(claims.claim(holder))) for _ in range(racers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(wins)


def _has_links(folder: Path) -> bool:
    try:
        os.link(folder / "from-0", folder / "link")
    except OSError:
        return False
    return True


def _lead_flock(team: Team, folder: Path, others: Sequence[int]) -> str:
    """Hold a lock and let the others try: all must be refused."""
    if importlib.util.find_spec("fcntl") is None:
        team.post("folder/flock", True)
        return "none"
    import fcntl

    with (folder / "flock").open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return "none"
        finally:
            team.post("folder/flock", True)
        tries = [_try_flock(folder), *(team.read(f"folder/flocked/{scout}", of=scout) for scout in others)]
    return next((one for one in tries if one != "held"), "held")


def _try_flock(folder: Path) -> str:
    if importlib.util.find_spec("fcntl") is None:
        return "none"
    import fcntl

    with (folder / "flock").open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "held"
        except OSError:
            return "none"
    return "shared"
