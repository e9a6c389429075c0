"""Click through the dashboard in headless Chromium: live, as one file, on a phone, by keyboard, with evil prompts."""

import threading

import pytest

from scripts.bench.browser import Browser, find_chromium
from training.dashboard.page import write_static_page
from training.dashboard.server import DashboardServer

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium here; apt-get install chromium")
LABEL = "document.querySelector('canvas').getAttribute('aria-label')"
COMPLETE = "document.documentElement.dataset.complete"


@pytest.fixture(scope="module")
def browser():
    with Browser(at_most_seconds=280) as browser:
        yield browser
        assert browser.errors == []


@pytest.fixture
def page(view, browser):
    """The browser at the live page, desktop size."""
    with DashboardServer(view, host="127.0.0.1", port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        browser.window(1280, 900)
        browser.requests.clear()
        browser.open(server.url)
        browser.wait_for(COMPLETE)
        yield browser
        assert {url for url in browser.requests if not url.startswith((server.url, "data:"))} == set()
        browser.open("about:blank")
        server.shutdown()
        thread.join()


def text(browser, selector):
    return browser.run(f"document.querySelector('{selector}').textContent")


def test_all_is_there_and_nothing_broke_in(page):
    assert page.run("document.querySelectorAll('.square[data-state=done]').length") >= 7
    assert "7 / 12" in text(page, "#tiles")
    assert page.run("document.title") == "58 % simulated"
    assert '<script>document.title="broken in"</script>' in text(page, "#prompt-text")
    assert page.run("document.querySelectorAll('#previews script, #film script, main img[onerror]').length") == 0
    assert page.run("document.querySelectorAll('.chart:not([hidden]) canvas').length") == 6
    pixels = "canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data"
    assert (
        page.run(f"(() => {{ const canvas = document.querySelector('canvas'); return new Set({pixels}).size; }})()")
        > 20
    )
    assert "Loss, from 0." in page.run(LABEL)


def test_span_axis_and_cross_hair(page):
    page.click("#span label:last-of-type input")
    page.wait_for(f"{LABEL}.includes('over steps 281 to 300')")
    page.click("#axis label:last-of-type input")
    page.wait_for(f"{LABEL}.includes('over images 2,810 to 3,000')")
    page.run("document.querySelectorAll('canvas')[3].focus()")
    page.press("ArrowLeft")
    assert text(page, ".chart output").startswith("image")
    page.press("Escape")
    assert text(page, ".chart output").startswith("now")


def test_chunks_tell_their_facts_by_mouse_and_keys(page):
    page.click("#map .square")
    assert "newest/0000 (done)" in text(page, "#facts") and "400 of 400" in text(page, "#facts")
    page.press("ArrowRight")
    assert "newest/0001 (done)" in text(page, "#facts")
    page.press("End")
    assert "(waiting)" in text(page, "#facts")
    assert page.run("document.querySelectorAll('.square[tabindex=\"0\"]').length") == 1


def test_two_previews_are_compared(page):
    assert page.run("[left.value, right.value]") == ["40", "280"]
    page.wait_for("document.getElementById('right-picture').naturalWidth === 24")
    page.click("#film button:nth-child(2)")
    assert page.run("[left.value, right.value]") == ["160", "280"]
    page.run("(({prompt}) => { prompt.value = '01'; prompt.dispatchEvent(new Event('change')); })(document.all)")
    assert text(page, "#prompt-text").startswith("scenery")
    page.wait_for("document.getElementById('left-picture').src.endsWith('step-00000160-01.png')")


def test_saved_states_are_shown_when_asked_for(page):
    before = page.run("document.querySelectorAll('#lines tr').length")
    page.click("#with-saves")
    assert page.run("document.querySelectorAll('#lines tr').length") > before


def test_new_lines_appear_without_a_reload(page, run_dir):
    run_dir.open_ledger(guard=lambda: None).append(
        "stopped", chunk="early/0000", global_step=290, reason="<b>asked for</b>"
    )
    page.wait_for("document.getElementById('lines').textContent.includes('<b>asked for</b>')", timeout_seconds=15)


@pytest.mark.parametrize(("width", "dark"), [(390, False), (320, True), (1280, True)])
def test_nothing_is_wider_than_the_window(page, width, dark):
    page.window(width, 844, dark=dark)

    assert page.run("document.documentElement.scrollWidth") <= width


def test_the_static_file_shows_the_same_without_a_server(view, browser, tmp_path):
    write_static_page(view, tmp_path / "run.html")
    browser.window(1280, 900)
    browser.requests.clear()
    browser.open((tmp_path / "run.html").as_uri())
    browser.wait_for(COMPLETE)

    assert "7 / 12" in text(browser, "#tiles")
    browser.wait_for("document.getElementById('right-picture').naturalWidth === 24")
    browser.click("#span label:last-of-type input")
    browser.wait_for(f"{LABEL}.includes('281 to 300')")
    assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == []
