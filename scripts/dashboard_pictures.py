"""Make the dashboard's pictures for the README, of a simulated run, with a headless Chromium.

python -m scripts.dashboard_pictures docs/pictures
"""

import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from scripts.bench.browser import Browser
from scripts.bench.simulated_run import Simulation, simulate_run
from training.dashboard.server import DashboardServer
from training.dashboard.view import RunView
from training.lock import RunLock


@dataclass(frozen=True)
class Shot:
    """One picture. first, last: ids in the sections that it shows; without `first` it begins at the top."""

    name: str
    width: int
    last: str
    first: str = ""
    is_dark: bool = False


SHOTS = (
    Shot("dashboard-desktop", 1280, last="curves"),
    Shot("dashboard-dark", 1280, first="chunks", last="previews", is_dark=True),
    Shot("dashboard-phone", 390, last="curves"),
)


def main(folder: Path) -> None:
    """Write the pictures as WebP into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        run_dir = simulate_run(Path(made) / "sote-a", Simulation(picture_side=384))
        view = RunView(run_dir.root)
        view.metrics.read_on()
        server = DashboardServer(view, host="127.0.0.1", port=0)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with server, RunLock.acquire(run_dir.lock_path), Browser() as browser:
            for shot in SHOTS:
                _take(browser, server.url, shot, Path(made) / "shot.png", folder)
            server.shutdown()


def _take(browser: Browser, url: str, shot: Shot, png: Path, folder: Path) -> None:
    browser.window(shot.width, 900, dark=shot.is_dark)
    browser.open("about:blank")
    browser.open(url)
    browser.wait_for("document.documentElement.dataset.complete")
    browser.wait_for("document.getElementById('right-picture').naturalWidth > 0")
    browser.run("scrollTo(0, document.body.scrollHeight)")  # so that pictures in the strip are loaded, too
    browser.wait_for("[...document.querySelectorAll('#film img')].slice(-8).every((image) => image.complete)")
    browser.run("scrollTo(0, 0)")
    browser.run("document.querySelector('#map .square[data-state=running]').click()")
    browser.run("board.point(150)")
    browser.screenshot(png, whole=True)
    with Image.open(png) as page:
        start = round(_edge(browser, shot.first, "top")) - 12 if shot.first else 0
        end = round(_edge(browser, shot.last, "bottom")) + 12
        picture = page.convert("RGB").crop((0, start, shot.width, end))
    picture.save(folder / f"{shot.name}.webp", quality=82, method=6)


def _edge(browser: Browser, name: str, side: str) -> float:
    """Return where on the page the section around an id begins or ends."""
    return float(browser.run(f"document.getElementById('{name}').closest('section').getBoundingClientRect().{side}"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
