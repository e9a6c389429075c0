"""`training status --watch`: how a run is, again and again: in place on a terminal, else in plain lines. No torch."""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from training.dashboard.metrics_columns import MetricsColumns
from training.dashboard.overview import Overview, OverviewReader
from training.dashboard.view import eta_text, state_words
from training.status_events import event_text
from training.status_queue import Queue, QueueReader

_HOME, _CLEAR_LINE, _CLEAR_BELOW, _HIDE, _SHOW = "\033[H", "\033[K", "\033[J", "\033[?25l", "\033[?25h"
_NUM_EVENTS = 12
_BAR_WIDTH = 30


@dataclass(frozen=True)
class Glance:
    """What one look at a run saw. problem: why it could not be read; then there is no overview."""

    overview: Overview | None
    queue: Queue | None
    problem: str = ""


class Watcher:
    """Looks at one run. A folder that is not there yet, or damage, is what it sees, no error."""

    def __init__(self, root: Path) -> None:
        self._reader = OverviewReader(root)
        self._metrics = MetricsColumns(self._reader.run_dir.metrics_path)
        self._queue = QueueReader(root)

    def look(self) -> Glance:
        """Read the run and the queue."""
        queue = self._queue.read()
        try:
            return Glance(self._reader.read(rows=self._metrics.last_rows()), queue)
        except (ValueError, OSError) as error:  # each names its file; what is being written is whole the next time
            return Glance(None, queue, str(error))


def watch(
    root: Path, out: TextIO, *, seconds: float, is_terminal: bool, num_looks: int | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:  # fmt: skip
    """Show the run until Ctrl-C, or so many times. seconds: between two looks. The cursor is given back in any case."""
    watcher, lines = Watcher(root), PlainLines()
    number = 0
    if is_terminal:
        out.write(_HIDE + _HOME + _CLEAR_BELOW)
    try:
        while True:
            glance = watcher.look()
            if is_terminal:
                size = shutil.get_terminal_size()
                _redraw(out, screen(glance, now=time.time()), columns=size.columns, rows=size.lines)
            else:
                out.writelines(f"{line}\n" for line in lines.of(glance))
                out.flush()
            number += 1
            if number == num_looks:
                return
            sleep(seconds)
    except KeyboardInterrupt:
        return
    finally:
        if is_terminal:
            out.write(f"{_SHOW}\n")
            out.flush()


def _redraw(out: TextIO, lines: Sequence[str], *, columns: int, rows: int) -> None:
    """Write over what is there, line by line, so that nothing flickers; what does not fit is cut."""
    shown = [f"{line[: columns - 1]}{_CLEAR_LINE}" for line in lines[: rows - 1]]
    out.write(_HOME + "\r\n".join(shown) + _CLEAR_BELOW)
    out.flush()


# --- as text ---


def screen(glance: Glance, *, now: float) -> list[str]:
    """Return the lines of the whole screen. now: seconds since 1970."""
    clock = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    overview = glance.overview
    if overview is None:
        return [clock, "", glance.problem, "waiting for it", *_queue_lines(glance.queue)]
    word, sentence = state_words(overview)
    lines = [f"{overview.title} ({overview.run_id})  {word}  {clock}", sentence, ""]
    lines += [f"{name:9}{_bar(share)} {share:6.1%}  {text}" for name, share, text in _progress(overview)]
    lines += ["", *(f"{name:9}{text}" for name, text in _facts(overview)), *_queue_lines(glance.queue), ""]
    events = [line for line in overview.lines if line.event != "state_saved"][-_NUM_EVENTS:]
    return lines + [f"{line.time}  {line.event:12} {event_text(line)}" for line in reversed(events)]


def _bar(share: float) -> str:
    full = round(min(max(share, 0.0), 1.0) * _BAR_WIDTH)
    return f"[{'#' * full}{'.' * (_BAR_WIDTH - full)}]"


def _progress(overview: Overview) -> Iterator[tuple[str, float, str]]:
    total = len(overview.campaign.names)
    yield "campaign", overview.done_fraction, f"{overview.num_done:,} of {total:,} chunks"
    if current := overview.current:
        share = current.steps_done / current.steps if current.steps else 0.0
        text = f"{current.name}, step {current.steps_done:,} of {current.steps:,}, saved up to {current.saved_steps:,}"
        yield "chunk", share, text


def _facts(overview: Overview) -> Iterator[tuple[str, str]]:
    if (speed := overview.speed) is not None:
        loss = "" if speed.loss is None else f", loss {speed.loss:.4f} (mean of 100 steps)"
        yield "speed", f"{speed.images_per_second:.2f} images/s, {speed.wait_fraction:.1%} waiting for data{loss}"
    yield "left", f"{eta_text(overview)}, {overview.eta.showings_left:,} images"
    if (last := overview.last_exit) is not None:
        yield "exit", f"{last.get('code')} ({last.get('time')}, {last.get('host')}, chunk {last.get('chunk')})"


def _queue_lines(queue: Queue | None) -> list[str]:
    return [] if queue is None else [f"{'queue':9}{queue.text()}"]


@dataclass
class PlainLines:
    """For a log file: a line when the state, the progress or the queue changed, and each new ledger line."""

    _said: list[str] = field(default_factory=list)
    _num_lines: int | None = None

    def of(self, glance: Glance) -> Iterator[str]:
        """Yield what is new since the last time; of a ledger met for the first time its last lines."""
        overview = glance.overview
        if overview is not None:
            known = max(len(overview.lines) - _NUM_EVENTS, 0) if self._num_lines is None else self._num_lines
            yield from (f"{line.time}  {line.event}  {event_text(line)}" for line in overview.lines[known:])
            self._num_lines = len(overview.lines)
        said = [_line(overview) if overview is not None else glance.problem, *_queue_lines(glance.queue)]
        yield from (line for line in said if line not in self._said)
        self._said = said


def _line(overview: Overview) -> str:
    parts = [f"{name} {share:.1%} {text}" for name, share, text in _progress(overview)]
    return "  ".join([state_words(overview)[0], *parts, f"left {eta_text(overview)}"])
