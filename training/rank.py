"""One rank of a launch: what all chunks that it trains share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from training.config import RunConfig
from training.engines.base import Engine
from training.ledger import Ledger
from training.records import Records
from training.run_dir import RunDir
from training.stages import stage_config
from training.state import StateSaver
from training.stop import StopRequest

Value = TypeVar("Value")


@dataclass(frozen=True)
class Rank:
    """See the module. records: rank 0's only; machine: what bit-equality depends on."""

    config: RunConfig
    run_dir: RunDir
    engine: Engine
    saver: StateSaver
    stop: StopRequest
    records: Records | None
    machine: Mapping[str, Any]

    @property
    def is_main(self) -> bool:
        """Whether this rank is the one that writes."""
        return self.records is not None

    @property
    def ledger(self) -> Ledger:
        """The ledger; rank 0 only."""
        assert self.records is not None
        return self.records.ledger

    def of_chunk(self, chunk: str) -> "Rank":
        """Return the same with the settings of a chunk: those of its stage, if it is one."""
        return replace(self, config=stage_config(self.config, chunk))

    def from_main(self, ask: Callable[[], Value]) -> Value:
        """Return what `ask` gives on rank 0, on every rank. If it raises there, the others raise RuntimeError."""
        value: Value | None = None
        error: Exception | None = None
        if self.is_main:
            try:
                value = ask()
            except Exception as caught:  # raised below, when the others know
                error = caught
        value, problem = self.engine.gather((value, None if error is None else str(error)))[0]
        if error is not None:
            raise error
        if problem is not None:
            raise RuntimeError(f"rank 0 could not go on: {problem}")
        answer: Value = value
        return answer

    def stop_reason(self) -> str:
        """Return why this rank was asked to stop, or ""; rank 0 looks for the stop file, too."""
        return self.stop.poll() if self.is_main else self.stop.poll_signals()

    def agreed_stop(self) -> str:
        """Return why any rank was asked to stop, the same on all of them; every rank has to call it."""
        return next((reason for reason in self.engine.gather(self.stop_reason()) if reason), "")
