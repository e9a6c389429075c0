"""A launch's working half: processes, networks and states of one rank, for one chunk or several in a row.

Made after the lock is held and the run's config is frozen (`training.launch`). Every rank has a session; what is
written is rank 0's. What happens to a chunk is in `training.chunk_run`.
"""

import logging
import os
from collections.abc import Callable, Sequence

from sharding.chunk import Chunk
from sharding.config import ConfigError
from training.alerts import Alerts
from training.chunk_run import ChunkRun
from training.config import RunConfig
from training.engines.choose import make_engine
from training.exit_codes import DONE
from training.ledger import Ledger, LedgerError
from training.lock import LockLostError
from training.machine import machine_facts
from training.position import Position
from training.precision import choose_device, set_exact
from training.rank import Rank
from training.records import Records
from training.run_dir import RunDir
from training.stages import stage_config
from training.state import StateSaver
from training.state_manifest import StateError
from training.stop import StopRequest
from training.trained import Trained, load_trained

logger = logging.getLogger(__name__)


class Session:
    """One rank of a launch. ledger: rank 0's, None elsewhere; guard: raises when this launch may no longer write."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: RunDir,
        *,
        ledger: Ledger | None,
        guard: Callable[[], None],
        num_processes: int | None,
        stop: StopRequest,
        alerts: Alerts | None = None,
    ) -> None:
        device = choose_device(config.device)
        exact = config.precision.exact if config.precision.exact is not None else device.type == "cpu"
        num_threads = set_exact(exact=exact, num_threads=config.precision.num_threads)
        engine = make_engine(config, device=device, exact=exact)
        _require_world_size(engine.world_size, num_processes)
        assert (engine.rank == 0) == (ledger is not None)
        records = Records(config, run_dir, ledger, alerts) if ledger is not None else None
        saver = StateSaver(
            asynchronous=config.save.asynchronous,
            check=guard,
            on_saved=records.state_saved if records is not None else None,
            keep_last=config.save.keep_states,
        )
        machine = machine_facts(
            num_processes=engine.world_size, device=engine.device, num_threads=num_threads, exact=exact
        )
        self._rank = Rank(config, run_dir, engine, saver, stop, records, machine)
        self._chunk_run: ChunkRun | None = None
        self._trained: Trained | None = None

    @property
    def position(self) -> Position | None:
        """Where training stands; after an error, where it was last known to stand."""
        return self._chunk_run.position if self._chunk_run is not None else None

    def run(self, chunks: Sequence[tuple[int, Chunk]]) -> int:
        """Train chunks, each with its number in the run, one after the other; return 0, or 75 when asked to stop.

        The next chunk's workers start while the last state of the one before is written. Where another stage begins,
        networks and optimizer are made anew, as in a launch of its own.
        """
        self._chunk_run = ChunkRun(self._rank, chunks[0][1], chunks[0][0])
        for coming in [*chunks[1:], None]:
            current = self._chunk_run
            if code := current.train(self._trained_for(current.config)):
                return code
            following = None
            if coming is not None and stage_config(self._rank.config, coming[1].name) == current.config:
                following = ChunkRun(self._rank, coming[1], coming[0], after=current.position)
            if code := current.finish():
                return code
            if coming is not None and following is None:
                self._trained = None
                following = ChunkRun(self._rank, coming[1], coming[0])
            self._chunk_run = following or current
        return DONE

    def _trained_for(self, config: RunConfig) -> Trained:
        if self._trained is None:
            self._rank.engine.release()  # what another stage trained: there may be no room for both
            self._trained = load_trained(config, self._rank.engine)
        return self._trained

    def close(self) -> None:
        """Finish the state that is being written and let go of trackers; after an error, too."""
        try:
            self._rank.saver.drain()
        except (StateError, LedgerError, LockLostError, OSError) as error:
            logger.error("the state under way was not saved: %s", error)
        finally:
            if self._rank.records is not None:
                self._rank.records.close()


def _require_world_size(world_size: int, wanted: int | None) -> None:
    """Raise ConfigError when there are not as many processes as asked for, or each believes itself alone."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != launched:
        raise ConfigError(
            f"the launcher started {launched} processes, but each believes it is one of {world_size}; on CPUs set "
            "ACCELERATE_USE_CPU=true and do not use `accelerate launch --cpu`"
        )
    if wanted is not None and world_size != wanted:
        raise ConfigError(
            f"--processes {wanted}: the launcher started {world_size}; `accelerate launch --cpu --num_processes "
            f"{wanted}` starts one, use ACCELERATE_USE_CPU=true with configs/accelerate/ddp.yaml"
        )
