"""The dashboard of a run of 708 chunks: from opening the page in headless Chromium until all of it is drawn.

Cold: a server that has read nothing yet; warm: one that knows the run. The history is made up: `simulated_run`.
"""

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from scripts.bench.browser import Browser, find_chromium
from scripts.bench.result import Bar, Result, peak_gigabytes
from scripts.bench.simulated_run import Simulation, simulate_run
from training.dashboard.server import DashboardServer
from training.dashboard.view import RunView

_COMPLETE = "document.documentElement.dataset.complete"
_SIMULATION = Simulation(num_done=700)
_FULL_STEPS = 1500
"""Steps a chunk: with 708 chunks a million rows, 1.3 GB."""
_REPEATS = 5


def run(*, full: bool, data: Path | None) -> Result:
    """Measure. full: a million rows instead of 44,000; data: a folder for the simulated run, which is left there."""
    simulation = replace(_SIMULATION, steps_per_chunk=_FULL_STEPS) if full else _SIMULATION
    with tempfile.TemporaryDirectory() as made:
        root = (data or Path(made)) / f"simulated-{simulation.steps_per_chunk}"
        if not root.exists():
            simulate_run(root, simulation)
        figures = _server_figures(root)
        notes = [f"{(root / 'metrics.jsonl').stat().st_size / 1e6:,.0f} MB of metrics.jsonl"]
        if find_chromium() is not None:
            figures |= _browser_figures(root)
        else:
            notes.append("no Chromium here: the page's own time was not measured")
    is_measured = "page_cold_seconds" in figures
    bars = [Bar(name, at_most=1.0) for name in ("page_cold_seconds", "page_warm_seconds")] if is_measured else []
    bars.append(Bar("server_warm_seconds", at_most=1.0))
    return Result("dashboard", figures, bars, is_measured, "none", notes)


def _server_figures(root: Path) -> dict[str, float]:
    """Return what the server needs for all that the first page asks for, cold and warm, and to read all metrics."""
    view = RunView(root)
    first = _seconds_of_parts(view)
    started = time.monotonic()
    view.metrics.read_on()
    read = time.monotonic() - started
    warm = min(_seconds_of_parts(view) for _ in range(_REPEATS))
    return {
        "num_rows": float(view.curves("all")["num_rows"]), "server_cold_seconds": first, "read_all_seconds": read,
        "server_warm_seconds": warm, "peak_gigabytes": peak_gigabytes(),
    }  # fmt: skip


def _seconds_of_parts(view: RunView) -> float:
    started = time.monotonic()
    for name in ("overview", "curves-all", "pictures", "disk"):
        view.parts()[name]()
    return time.monotonic() - started


def _browser_figures(root: Path) -> dict[str, float]:
    cold, warm = [], []
    with Browser(at_most_seconds=300) as browser:
        browser.window(1280, 900)
        for _ in range(_REPEATS + 1):
            with _served(root) as server:
                cold.append(_page_seconds(browser, server))
        del cold[0]  # the first page of all starts the browser's own processes
        view = RunView(root)
        view.metrics.read_on()
        with _served(root, view) as server:
            warm += [_page_seconds(browser, server) for _ in range(_REPEATS)]
    return {"page_cold_seconds": sorted(cold)[_REPEATS // 2], "page_warm_seconds": sorted(warm)[_REPEATS // 2]}


def _page_seconds(browser: Browser, server: DashboardServer) -> float:
    """Return the time from the start of the navigation until everything was drawn, by the page's own clock."""
    browser.open("about:blank")
    browser.open(server.url)
    return float(browser.wait_for(_COMPLETE, timeout_seconds=60)) / 1000


@contextmanager
def _served(root: Path, view: RunView | None = None) -> Iterator[DashboardServer]:
    with DashboardServer(view or RunView(root), host="127.0.0.1", port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
