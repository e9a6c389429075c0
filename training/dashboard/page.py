"""The page: the same HTML, CSS and JavaScript for the server and for one file that needs none. No network, ever."""

import base64
import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from sharding.files import open_replacing
from training.dashboard.view import RunView

_STATIC_STEPS = 40
_SCRIPTS = ("curves.js", "chunk_map.js", "previews.js", "page.js")
FILES = {
    "page.css": "text/css; charset=utf-8",
    **dict.fromkeys(_SCRIPTS, "text/javascript; charset=utf-8"),
}
"""What the page loads from the server, with types."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content-Security-Policy of the server's page: nothing but its own files, no inline script."""


def web_file(name: str) -> str:
    """Return the text of a file of the page."""
    return (files("training.dashboard") / "web" / name).read_text(encoding="utf-8")


def live_page() -> str:
    """Return the page as the server gives it out."""
    links = '<link rel="stylesheet" href="page.css">'
    return _page(links, "".join(f'<script src="{name}" defer></script>\n' for name in _SCRIPTS))


def static_page(view: RunView, *, picture_height: int = 320) -> str:
    """Return a page with all it shows inside; of many previews forty steps from all over the run. Raises as RunView."""
    view.metrics.read_on()
    data: dict[str, Any] = {name: part() for name, part in view.parts().items() if name != "pictures"}
    data["pictures"] = _with_pictures(view, picture_height)
    script = "\n".join(web_file(name) for name in _SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:"
    head = f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<style>{web_file("page.css")}</style>'
    embedded = f'<script type="application/json" id="data">{_embedded(data)}</script>\n<script>{script}</script>\n'
    return _page(head, embedded)


def write_static_page(view: RunView, path: Path) -> None:
    """Write `static_page`, whole or not at all."""
    page = static_page(view)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_replacing(path) as stream:
        stream.write(page.encode())


def _page(head: str, end: str) -> str:
    return web_file("page.html").replace("<!-- head -->", head).replace("<!-- scripts -->", end)


def _embedded(data: dict[str, Any]) -> str:
    """Return JSON that cannot end the script element it stands in, whatever a prompt says."""
    return json.dumps(data, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")


def _with_pictures(view: RunView, height: int) -> dict[str, Any]:
    listing = view.pictures()
    steps, chunks = listing["steps"], list(view.read().campaign.records)
    if len(steps) > _STATIC_STEPS:
        last = len(steps) - 1
        steps = [steps[round(number * last / (_STATIC_STEPS - 1))] for number in range(_STATIC_STEPS)]
    for step in steps:
        for picture in step["pictures"].values():
            file = view.previews.file(picture["path"], chunks)
            if file is not None:
                data = base64.b64encode(view.previews.small(file, height=height)).decode()
                picture["data"] = f"data:image/webp;base64,{data}"
    return {**listing, "steps": steps}
