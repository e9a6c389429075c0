"""Errors that end a launch although nothing is wrong with its files. No torch: exit codes are told without it."""

from typing import ClassVar


class TroubleError(RuntimeError):
    """Something went wrong in steps that a run may go back behind. steps: their global steps, counted from 1."""

    reason: ClassVar[str]
    """In the ledger's `rolled_back` line; a chunk goes back once for each."""

    def __init__(self, message: str, steps: range) -> None:
        super().__init__(message)
        self.steps = steps


class NonFiniteError(TroubleError):
    """Too many steps in a row had a non-finite loss or gradient."""

    reason = "not_finite"


class LossSpikeError(TroubleError):
    """The loss of a step lies far above those before it, and there is a state to go back to."""

    reason = "loss_spike"


class LostWorkerError(RuntimeError):
    """Loader workers were killed again and again."""


class RemoteError(RuntimeError):
    """A workspace elsewhere cannot be read."""


class BrokenDataError(ValueError):
    """More images of a chunk failed at run time than max_broken_fraction allows."""
