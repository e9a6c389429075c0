"""The server: what it answers, what it refuses, and that the page asks nobody else."""

import gzip
import http.client
import json
import re
import threading

import pytest

from training.cli import main
from training.dashboard.page import FILES, live_page, static_page, web_file
from training.dashboard.server import DashboardServer
from training.dashboard.view import RunView


@pytest.fixture
def ask(view):
    """A function: path, headers → status, headers, body."""
    with DashboardServer(view, host="127.0.0.1", port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()

        def get(path, method="GET", **headers):
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
            connection.request(method, path, headers={name.replace("_", "-"): text for name, text in headers.items()})
            answer = connection.getresponse()
            found = answer.status, dict(answer.getheaders()), answer.read()
            connection.close()
            return found

        yield get
        server.shutdown()
        thread.join()


def test_the_page_and_all_its_parts_are_there(ask, view):
    status, headers, body = ask("/")

    assert status == 200 and "default-src 'none'" in headers["Content-Security-Policy"]
    for name in re.findall(rb'(?:src|href)="([a-z_]+\.[a-z]+)"', body):
        assert ask(f"/{name.decode()}")[0] == 200
    for name in view.parts():
        status, headers, body = ask(f"/data/{name}", Accept_Encoding="gzip")
        values = json.loads(gzip.decompress(body) if headers.get("Content-Encoding") == "gzip" else body)
        assert status == 200 and values


def test_pictures_whole_and_small(ask, view):
    path = view.pictures()["steps"][0]["pictures"]["00"]["path"]

    assert ask(f"/picture/{path}")[2][:4] == b"\x89PNG"
    assert ask(f"/picture/{path}?height=80")[1]["Content-Type"] == "image/webp"
    assert ask(f"/picture/{path}?height=100000")[1]["Content-Type"] == "image/png"


@pytest.mark.parametrize(
    "path",
    ["/nothing", "/data/nothing", "/data/", "/picture/", "/picture/..%2f..%2frun.toml", "/picture/newest/0000/run.toml",
     "/../run.toml", "/web/page.css", "/page.html"],
)  # fmt: skip
def test_nothing_else_is_given_out(ask, path):
    status, headers, body = ask(path)

    assert status == 404 and headers["Content-Type"].startswith("text/plain") and b"simulated" not in body


def test_only_reading_is_possible(ask):
    assert ask("/data/overview", method="POST")[0] == 501


def test_another_sites_name_is_refused(ask):
    assert ask("/data/overview", Host="evil.example:6007")[0] == 403
    assert ask("/data/overview", Host="localhost:6007")[0] == 200
    assert ask("/data/overview", Host="[::1]:6007")[0] == 200


def test_damage_is_said_and_the_server_goes_on(ask, run_dir):
    ledger = run_dir.ledger_path.read_bytes()
    run_dir.ledger_path.write_bytes(b"{}\n" + ledger)

    status, _, body = ask("/data/overview")

    assert status == 500 and b"line 1: not a ledger line" in body
    run_dir.ledger_path.write_bytes(ledger)
    assert ask("/data/overview")[0] == 200


def test_a_run_that_comes_later_is_waited_for(tmp_path):
    with DashboardServer(RunView(tmp_path / "run"), host="127.0.0.1", port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        connection.request("GET", "/data/overview")
        answer = connection.getresponse()
        assert (answer.status, b"no run was started" in answer.read()) == (503, True)
        connection.close()
        server.shutdown()
        thread.join()


def test_a_port_in_use_is_said(view, capsys):
    with DashboardServer(view, host="127.0.0.1", port=0) as server:
        code = main(["dashboard", "--run-dir", str(view.root), "--port", str(server.server_port)])

    assert code == 2 and "cannot listen there" in capsys.readouterr().err


# --- the page ---


def test_the_page_asks_for_nothing_from_elsewhere():
    for text in (live_page(), *map(web_file, FILES)):
        assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", text)


def test_no_text_ever_becomes_markup():
    scripts = "".join(web_file(name) for name in FILES)

    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|srcdoc", scripts
    )


def test_a_prompt_cannot_leave_the_data_of_the_static_page(view):
    page = static_page(view)

    data = page.split('id="data">')[1].split("</script>")[0]
    assert '<script>document.title="broken in"</script>' not in page
    assert "<script>" in json.loads(data)["pictures"]["texts"][0]
    assert page.count("<script") == 2 and json.loads(data)["pictures"]["steps"][0]["pictures"]["00"]["data"]
