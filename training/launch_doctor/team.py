"""How the ranks of a launch talk while it is in doubt whether they can: a key-value store, nothing collective.

The store is the one that torch's own rendezvous uses (MASTER_ADDR, MASTER_PORT as the launcher sets them). Waiting is
polling with a deadline, so that a rank that never answers is named instead of waited for.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

Value = TypeVar("Value")

_POLL_SECONDS = 0.01
_PATIENCE = 0.8
"""Part of a phase's time that one may wait for one other rank: who waits in vain can still say for whom."""
_GRACE_SECONDS = 3.0
"""For an answer that is on its way when the deadline has passed."""


class SilentRanksError(RuntimeError):
    """Ranks did not answer. ranks: which, and how far each came."""

    def __init__(self, phase: str, ranks: Mapping[int, str]) -> None:
        super().__init__(f"{phase}: no answer from " + "; ".join(f"rank {rank} ({ranks[rank]})" for rank in ranks))
        self.phase, self.ranks = phase, dict(ranks)


class HangError(RuntimeError):
    """Work of this process did not end in time."""


@dataclass(frozen=True)
class Answer(Generic[Value]):
    """What a rank found in a phase: a value, or why there is none."""

    value: Value | None
    problem: str = ""


class Team:
    """One rank's end of the conversation."""

    def __init__(self, store: Store, *, rank: int, world_size: int, timeout_seconds: float) -> None:
        self.rank, self.world_size, self.timeout_seconds = rank, world_size, timeout_seconds
        self._store = PrefixStore("launch-doctor", store)

    @classmethod
    def join(cls, *, timeout_seconds: float) -> "Team":
        """Meet the others where the launcher says. Raises SilentRanksError when rank 0 cannot be reached."""
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if world_size == 1:
            return cls(HashStore(), rank=0, world_size=1, timeout_seconds=timeout_seconds)
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        is_main = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else the launcher serves it
        try:
            store = TCPStore(
                host, port, world_size, is_main, timedelta(seconds=timeout_seconds), wait_for_workers=False,
                multi_tenant=True,
            )  # fmt: skip
        except (dist.DistError, RuntimeError) as error:
            raise SilentRanksError(f"rendezvous at {host}:{port}", {0: str(error).splitlines()[0]}) from error
        return cls(store, rank=rank, world_size=world_size, timeout_seconds=timeout_seconds)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def post(self, key: str, value: Any) -> None:
        """Put a value, as JSON, where the others find it."""
        self._store.set(key, json.dumps(value))

    def count(self, key: str) -> int:
        """Add 1 to a counter and return it."""
        return int(self._store.add(key, 1))

    def has(self, key: str) -> bool:
        """Tell whether something was posted under a key."""
        return bool(self._store.check([key]))

    def read(self, key: str, *, of: int = 0, seconds: float | None = None) -> Any:
        """Return what rank `of` posts under a key. Raises SilentRanksError when nothing comes in time."""
        deadline = time.monotonic() + (_PATIENCE * self.timeout_seconds if seconds is None else seconds)
        while not self.has(key):
            if time.monotonic() > deadline:
                raise SilentRanksError(key, {of: "did not say"})
            time.sleep(_POLL_SECONDS)
        return json.loads(self._store.get(key))

    def wait_for(self, key: str) -> None:
        """Wait without polling, for measuring. Raises SilentRanksError."""
        try:
            self._store.wait([key], timedelta(seconds=self.timeout_seconds / 2))
        except (dist.DistError, RuntimeError) as error:
            raise SilentRanksError(key, {0: "did not say"}) from error

    def phase(self, name: str, work: Callable[[], Value]) -> list[Answer[Value]]:
        """Do a piece of work on every rank; return all answers on rank 0, and only its own on another.

        Values must be what JSON holds. A problem on one rank is its answer. Raises SilentRanksError, on rank 0 with
        all ranks that did not end.
        """
        deadline = time.monotonic() + self.timeout_seconds + _GRACE_SECONDS
        self.post(f"{name}/began/{self.rank}", True)
        own: Answer[Value]
        try:
            own = Answer(within(self.timeout_seconds, work))
        except (HangError, SilentRanksError) as error:
            raise self._silence(name, error) from error
        except Exception as error:  # becomes a row of the table
            own = Answer(None, f"{type(error).__name__}: {error}")
        self.post(f"{name}/done/{self.rank}", [own.value, own.problem])
        if not self.is_main:
            return [own]
        while missing := self._unfinished(name):
            if time.monotonic() > deadline:
                raise SilentRanksError(name, missing)
            time.sleep(_POLL_SECONDS)
        return [Answer(*self.read(f"{name}/done/{rank}")) for rank in range(self.world_size)]

    def _silence(self, name: str, error: HangError | SilentRanksError) -> SilentRanksError:
        """Return whom to blame for work that waited in vain: ranks that never came, else whoever it waited for."""
        if not self.is_main:
            return SilentRanksError(name, {self.rank: str(error)})
        missing = self._unfinished(name)
        if isinstance(error, HangError) or not all(self.has(f"{name}/began/{rank}") for rank in missing):
            return SilentRanksError(name, missing)
        said = {rank: f"{name}/done/{rank}" for rank in error.ranks}
        problems = {rank: self.read(key)[1] for rank, key in said.items() if self.has(key)}
        return SilentRanksError(name, {**error.ranks, **{rank: text for rank, text in problems.items() if text}})

    def end(self) -> None:
        """Say that the report is made; others wait for that, because a launcher ends all when one rank ends badly."""
        if self.is_main:
            self.post("end", True)
            self._wait_for_all("bye")
        else:
            try:
                self.read("end", seconds=2 * self.timeout_seconds + 2 * _GRACE_SECONDS)
            except (SilentRanksError, dist.DistError, RuntimeError):
                return  # rank 0 is gone: there is nobody to report to
            self.post(f"bye/{self.rank}", True)

    def _wait_for_all(self, key: str) -> None:
        """Keep the store, which this process may serve, until the others are done with it, or silent."""
        deadline = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < deadline and not all(self.has(f"{key}/{r}") for r in range(1, self.world_size)):
            time.sleep(_POLL_SECONDS)

    def _unfinished(self, name: str) -> dict[int, str]:
        silent = [rank for rank in range(self.world_size) if not self.has(f"{name}/done/{rank}")]
        absent = [rank for rank in silent if not self.has(f"{name}/began/{rank}")]
        return dict.fromkeys(absent, "did not come") or dict.fromkeys(silent, "began, but did not end")


def within(seconds: float, work: Callable[[], Value]) -> Value:
    """Do work in a thread and return its value. Raises HangError after so many seconds; the thread is left behind."""
    values, errors = list[Value](), list[BaseException]()

    def run() -> None:
        try:
            values.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise HangError(f"not done after {seconds:.0f} s")
    if errors:
        raise errors[0]
    return values[0]
