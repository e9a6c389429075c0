"""The dashboard's server: the standard library's, GET only, reads only the run's folder, gives out nothing else.

A page of another site that makes the browser ask this address (DNS rebinding) is refused by its Host header.
"""

import gzip
import ipaddress
import json
import logging
import socket
import socketserver
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from training.dashboard.overview import RunNotThereError
from training.dashboard.page import FILES, POLICY, live_page, web_file
from training.dashboard.view import RunView

logger = logging.getLogger(__name__)

_MIN_GZIP_BYTES = 2000
_HEIGHTS = (80, 160, 320)
"""Of small pictures: few, so that the cache is of use."""
_READ_SECONDS, _FIRST_PAGE_SECONDS = 0.2, 1.0


class DashboardServer(ThreadingHTTPServer):
    """Serves one run. Raises OSError when the address is in use."""

    daemon_threads = True

    def __init__(self, view: RunView, *, host: str, port: int) -> None:
        self.view = view
        self.host = host
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._is_closed = threading.Event()
        super().__init__((host, port), _Handler)
        threading.Thread(target=self._read_metrics, daemon=True, name="read metrics").start()

    def server_bind(self) -> None:
        """Listen, without the standard library's look-up of this machine's name, which may take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.host, self.server_address[1]

    @property
    def url(self) -> str:
        """Where a browser on this machine finds it."""
        host = "localhost" if self.host in ("", "0.0.0.0", "::") else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}/"

    def serves(self, host_header: str) -> bool:
        """Tell whether a request's Host is one that this server is reached by: any, unless it listens to loopback."""
        name = urlsplit(f"//{host_header}").hostname or ""
        return not _is_loopback(self.host) or _is_loopback(name)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what went wrong in a connection; a browser that went away is nothing to print a traceback for."""
        logger.debug("connection of %s", client_address, exc_info=True)

    def _read_metrics(self) -> None:
        """Read what was there at the start, in pieces, and after the first page, which should not wait for it."""
        if self._is_closed.wait(_FIRST_PAGE_SECONDS):
            return
        while not self.view.metrics.read_on(for_seconds=_READ_SECONDS) and not self._is_closed.wait(0.01):
            pass

    def server_close(self) -> None:
        """Stop listening, and reading."""
        self._is_closed.set()
        super().server_close()


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Handler(BaseHTTPRequestHandler):
    server: DashboardServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:  # the name is the standard library's
        if not self.server.serves(self.headers.get("Host", "")):
            self._text(HTTPStatus.FORBIDDEN, "open it as localhost: this dashboard answers on this machine only\n")
            return
        parts = urlsplit(self.path)
        name = unquote(parts.path).lstrip("/")
        try:
            if name in ("", "index.html"):
                self._send(HTTPStatus.OK, live_page().encode(), "text/html; charset=utf-8")
            elif name in FILES:
                self._send(HTTPStatus.OK, web_file(name).encode(), FILES[name])
            elif name.startswith("data/"):
                self._data(name.removeprefix("data/"))
            elif name.startswith("picture/"):
                self._picture(name.removeprefix("picture/"), parse_qs(parts.query).get("height", [""])[0])
            else:
                self._text(HTTPStatus.NOT_FOUND, "there is nothing here\n")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the browser went away
        except RunNotThereError as error:
            self._text(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n")
        except (ValueError, OSError) as error:  # damage in the run's files: its message says which
            logger.warning("%s: %s", self.path, error)
            self._text(HTTPStatus.INTERNAL_SERVER_ERROR, f"{error}\n")

    def _data(self, name: str) -> None:
        part = self.server.view.parts().get(name)
        if part is None:
            self._text(HTTPStatus.NOT_FOUND, "there is no such part\n")
            return
        body = json.dumps(part(), ensure_ascii=False, allow_nan=False).encode()
        self._send(HTTPStatus.OK, body, "application/json")

    def _picture(self, path: str, height: str) -> None:
        view = self.server.view
        file = view.previews.file(path, list(view.read().campaign.records))
        if file is None:
            self._text(HTTPStatus.NOT_FOUND, "there is no such picture\n")
        elif height in map(str, _HEIGHTS):
            self._send(HTTPStatus.OK, view.previews.small(file, height=int(height)), "image/webp", is_lasting=True)
        else:
            self._send(HTTPStatus.OK, file.read_bytes(), "image/png", is_lasting=True)

    def _text(self, status: HTTPStatus, text: str) -> None:
        self._send(status, text.encode(), "text/plain; charset=utf-8")

    def _send(self, status: HTTPStatus, body: bytes, kind: str, *, is_lasting: bool = False) -> None:
        is_packed = len(body) > _MIN_GZIP_BYTES and not kind.startswith("image/")
        is_packed = is_packed and "gzip" in self.headers.get("Accept-Encoding", "")
        body = gzip.compress(body, 1) if is_packed else body
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if is_packed:
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Cache-Control", "private, max-age=3600" if is_lasting else "no-store")
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # the name is the standard library's
        logger.debug(format, *args)
