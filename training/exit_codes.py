"""Exit codes are a contract: 0 done, 1 failed, 2 bad usage or config, 3 bad data, 75 stopped with state saved."""

from sharding.chunk import ChunkError
from sharding.config import ConfigError
from sharding.files import DiskFullError
from sharding.images import ImageError
from sharding.tables import DamagedPartError
from training.buckets import BucketError
from training.errors import BrokenDataError, LostWorkerError, NonFiniteError, RemoteError
from training.ledger import LedgerError
from training.lock import LockHeldError, LockLostError
from training.metrics_file import MetricsError

DONE, FAILED, BAD_USAGE, BAD_DATA, STOPPED = 0, 1, 2, 3, 75

_BAD_DATA = (ChunkError, DamagedPartError, LedgerError, MetricsError, ImageError, BucketError, BrokenDataError)
_BAD_USAGE = (ConfigError, LockHeldError, FileNotFoundError)


def code_of(error: BaseException) -> int:
    """Return the exit code for an error: 3 for data that is damaged, 2 for what a user can change, 1 for the rest."""
    if isinstance(error, _BAD_DATA):
        return BAD_DATA
    if isinstance(error, _BAD_USAGE):
        return BAD_USAGE
    if not isinstance(error, ValueError):
        return FAILED
    # These modules import torch: a refused launch should not wait for that.
    from training.state_manifest import StateError
    from training.weight_files import WeightsError

    return BAD_DATA if isinstance(error, WeightsError | StateError) else BAD_USAGE


def is_foreseen(error: BaseException) -> bool:
    """Tell whether an error's message says all: one line for the user; anything else gets its traceback."""
    return code_of(error) != FAILED or isinstance(
        error, DiskFullError | LockLostError | LostWorkerError | NonFiniteError | RemoteError
    )
