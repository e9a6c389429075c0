"""The ledger's lines as a reader sees them who comes back every few seconds: only what is new is read.

That each line follows the one before is looked at; hashes are not computed: every launch and `status --verify` do that.
"""

import json
import threading
from pathlib import Path

from training.dashboard.grown_file import START, Place, read_blocks
from training.ledger import LedgerError, Line


class LedgerLines:
    """See the module. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place: Place = START
        self._lines: list[Line] = []
        self._lock = threading.Lock()

    def read(self) -> list[Line]:
        """Return all lines; an unterminated last one (being written) is left out. Raises LedgerError."""
        with self._lock:
            self._read_on()
            return list(self._lines)

    def _read_on(self) -> None:
        if not self._place.still_holds(self._path):
            self._place, self._lines = START, []
        for block, place in read_blocks(self._path, self._place):
            for raw in block.splitlines():
                self._lines.append(self._line(raw))
            self._place = place

    def _line(self, raw: bytes) -> Line:
        where = f"{self._path}: line {len(self._lines) + 1}"
        try:
            line = Line(**json.loads(raw))
        except (ValueError, TypeError) as error:
            self._place, self._lines = START, []
            raise LedgerError(f"{where}: not a ledger line ({error}); restore the file from a copy") from error
        if self._lines and line.previous != self._lines[-1].hash:
            self._place, self._lines = START, []
            raise LedgerError(f"{where}: does not follow the line before: a line was removed, added or moved")
        return line
