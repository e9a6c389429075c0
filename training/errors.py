"""Errors that end a launch although nothing is wrong with its files. No torch: exit codes are told without it."""


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a non-finite loss or gradient. steps: their global steps, counted from 1."""

    def __init__(self, message: str, steps: range) -> None:
        super().__init__(message)
        self.steps = steps


class LostWorkerError(RuntimeError):
    """Loader workers were killed again and again."""


class RemoteError(RuntimeError):
    """A workspace elsewhere cannot be read."""


class BrokenDataError(ValueError):
    """More images of a chunk failed at run time than max_broken_fraction allows."""
