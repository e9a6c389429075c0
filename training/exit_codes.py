"""Exit codes are a contract: 0 done, 1 failed, 2 bad usage or config, 3 bad data, 75 stopped with state saved."""

from sharding.chunk import ChunkError
from sharding.config import ConfigError
from sharding.images import ImageError
from sharding.tables import DamagedPartError
from training.buckets import BucketError
from training.ledger import LedgerError
from training.lock import LockHeldError
from training.loop import BrokenDataError
from training.run_dir import ConfigChangedError
from training.stage_c.weight_files import WeightsError
from training.state import StateError

_BAD_DATA = (
    ChunkError,
    DamagedPartError,
    BrokenDataError,
    StateError,
    LedgerError,
    WeightsError,
    ImageError,
    BucketError,
)
_BAD_USAGE = (ConfigError, ConfigChangedError, LockHeldError, FileNotFoundError, ValueError)


def code_of(error: BaseException) -> int:
    """Return the exit code for an error: 3 for data that is damaged, 2 for what a user can change, 1 for the rest."""
    if isinstance(error, _BAD_DATA):
        return 3
    return 2 if isinstance(error, _BAD_USAGE) else 1
