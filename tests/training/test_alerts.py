"""Alerts: what is told, how often, and that nothing of it stops or slows training."""

import json
import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sharding.config import ConfigError, load_config
from tests.training.paper_run import PaperRun
from tests.training.test_gauges import report
from training import alerts as alerts_module
from training.alerts import WEBHOOK_VARIABLE, Alerts
from training.config import RunConfig
from training.config.watching import TrackerConfig
from training.launch import launch
from training.position import Position
from training.records import Records
from training.run_dir import RunDir
from training.spikes import Spike
from training.step_report import StepReport
from training.trackers import WandB, make_trackers

SPIKE = Spike(9.0, 1.0, 20.0, is_first=True)


class Hook:
    """A web server that keeps what is POSTed to it. seconds: how long it takes to answer; status: what it answers."""

    def __init__(self, *, seconds=0.0, status=200):
        got = self.got = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                got.append((self.headers["Content-Type"], json.loads(body)))
                time.sleep(seconds)
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/secret"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def kinds(self):
        return [body["kind"] for _, body in self.got]

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hook():
    hook = Hook()
    yield hook
    hook.close()


def made(hook=None, *, clock=time.monotonic, is_main=True, **settings):
    webhook = {"webhook": hook.url} if hook is not None else {}
    return Alerts(TrackerConfig(**webhook, **settings), run="sote", clock=clock, is_main=is_main)


def step(number, *, problem="", waited=0.0):
    one = report(1.0, step=number)
    after = Position(chunk="toy/0000", global_step=number, step=number)
    return StepReport(one.step, one.before, after, one.results, (), problem, {}, 1.0, 2.0, waited)


def test_a_spike_is_posted_with_run_chunk_step_and_what(hook):
    alerts = made(hook)

    alerts.step_done(step(41216), SPIKE)
    alerts.close()

    [(content_type, body)] = hook.got
    assert content_type == "application/json"
    assert (body["run"], body["chunk"], body["step"], body["kind"]) == ("sote", "toy/0000", 41216, "spike")
    assert body["what"] == str(SPIKE)
    assert body["text"] == f"sote toy/0000 step 41,216: {SPIKE}"


def test_of_one_kind_there_is_one_alert_in_ten_minutes_and_the_next_counts_those_between(hook):
    now = [0.0]
    alerts = made(hook, clock=lambda: now[0])

    for number in range(5):
        alerts.step_done(step(number, problem="not_finite"), None)
    alerts.step_done(step(5), SPIKE)
    now[0] = 601.0
    alerts.step_done(step(6, problem="not_finite"), None)
    alerts.close()

    assert hook.kinds == ["not_finite", "spike", "not_finite"]
    assert hook.got[-1][1]["what"].endswith("(and 4 more of this kind since the last alert)")


def test_the_same_cause_is_told_once_however_late(hook):
    now = [0.0]
    alerts = made(hook, clock=lambda: now[0])

    for now[0] in (0.0, 1000.0, 2000.0):
        alerts.failed(ValueError("no such chunk"), chunk="toy/0000")
    alerts.close()

    assert hook.kinds == ["failed"]
    assert hook.got[0][1]["what"] == "the launch failed: ValueError: no such chunk"


def test_waiting_for_data_is_told_once_it_lasts_and_again_only_after_it_ended(hook):
    now = [0.0]
    alerts = made(hook, clock=lambda: now[0], alert_wait_fraction=0.5, alert_wait_steps=3)

    for number, waited in enumerate([1.5, 1.5, 0.1, 1.5, 1.5, 1.5, 1.5, 1.5, 0.0, 1.5, 1.5, 1.5]):
        now[0] += 300
        alerts.step_done(step(number, waited=waited), None)
    alerts.close()

    assert [body["step"] for _, body in hook.got] == [5, 11]
    assert "more than 50% of the time in 3 steps in a row, 75% in the last" in hook.got[0][1]["what"]


def test_waiting_is_not_judged_when_the_limit_is_0(hook):
    alerts = made(hook, alert_wait_fraction=0, alert_wait_steps=1)

    alerts.step_done(step(1, waited=2.0), None)
    alerts.close()

    assert hook.got == []


def test_a_low_disk_is_told_when_it_gets_low(hook, tmp_path, monkeypatch):
    now, free = [0.0], [0]
    monkeypatch.setattr(alerts_module, "free_bytes", lambda _: free[0])
    alerts = made(hook, clock=lambda: now[0])

    for number, free[0] in enumerate([2001, 1999, 1500, 3000, 100]):
        now[0] += 1000
        alerts.state_saved(tmp_path, Position("toy/0000", global_step=number), state_bytes=1000)
    alerts.close()

    assert [(body["kind"], body["step"]) for _, body in hook.got] == [("low_disk", 1), ("low_disk", 4)]


def test_a_slow_webhook_does_not_slow_training_and_closing_waits_a_moment_only(monkeypatch):
    monkeypatch.setattr(alerts_module, "_LAST_WAIT_SECONDS", 0.2)
    slow = Hook(seconds=1.0)
    alerts, started = made(slow), time.monotonic()

    alerts.step_done(step(1), SPIKE)
    assert time.monotonic() - started < 0.1
    alerts.close()

    assert time.monotonic() - started < 0.8
    slow.close()


def test_a_webhook_that_fails_is_logged_once_without_its_address(caplog):
    broken = Hook(status=500)
    alerts = made(broken)

    with caplog.at_level(logging.WARNING):
        alerts.step_done(step(1), SPIKE)
        alerts.step_done(step(2, problem="not_finite"), None)
        alerts.close()

    broken.close()
    assert len(broken.got) == 2
    [message] = [record.getMessage() for record in caplog.records]
    assert (
        message == "alerts do not reach the webhook: HTTPError: HTTP Error 500: Internal Server Error; training goes on"
    )


def test_nothing_is_told_without_a_webhook_or_by_another_rank(hook, monkeypatch):
    for alerts in (made(), made(hook, is_main=False)):
        alerts.step_done(step(1), SPIKE)
        assert alerts._thread is None
        alerts.close()

    assert hook.got == []


def test_the_address_may_come_from_the_environment(hook, monkeypatch):
    monkeypatch.setenv(WEBHOOK_VARIABLE, hook.url)
    alerts = made()
    alerts.step_done(step(1), SPIKE)
    alerts.close()
    assert hook.kinds == ["spike"]

    monkeypatch.setenv(WEBHOOK_VARIABLE, "hooks.example.org/x")
    with pytest.raises(ConfigError, match=r"CHUNKLINE_WEBHOOK: must begin with https:// or http://") as caught:
        made()
    assert "example" not in str(caught.value)


def test_an_address_that_is_none_is_refused_without_showing_it(run_toml):
    with pytest.raises(ConfigError, match=r"trackers: webhook must begin with https:// or http://") as caught:
        load_config(run_toml, RunConfig, ["trackers.webhook=hooks.example.org/secret"])

    assert "secret" not in str(caught.value)


def test_the_end_of_the_campaign_is_told_by_its_last_chunk_only(hook, run_toml, tmp_path, monkeypatch):
    run = PaperRun(run_toml, tmp_path / "run")
    alerts = Alerts(TrackerConfig(webhook=hook.url), run="tiny")
    monkeypatch.setattr("tests.training.paper_run.Records", lambda *facts: Records(*facts, alerts))

    run.train_all()
    alerts.close()

    [(_, body)] = hook.got
    assert (body["kind"], body["chunk"], body["step"]) == ("campaign_done", "made/0001", 2)
    assert body["what"] == "all 2 chunks are trained, 8 images seen"


@pytest.mark.usefixtures("own_accelerator")
def test_a_launch_that_fails_tells_why(hook, run_toml, tmp_path):
    run = PaperRun(run_toml, tmp_path / "run", f"trackers.webhook={hook.url}")

    with pytest.raises(Exception, match=r"none\.safetensors"):
        launch(run.config, tmp_path / "run", chunk_name="made/0000")

    [(_, body)] = hook.got
    assert (body["kind"], body["run"], body["chunk"]) == ("failed", "tiny", "made/0000")
    assert "none.safetensors" in body["what"]


def test_trackers_do_not_get_to_see_the_webhook(run_toml, tmp_path):
    run = PaperRun(run_toml, tmp_path / "run", "trackers.webhook=https://hooks.example.org/secret")

    assert "secret" not in json.dumps(run.config.shown())


@pytest.mark.usefixtures("own_accelerator")
def test_no_log_shows_a_webhook_that_changed_between_launches(run_toml, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for name in ("old-secret", "new-secret"):
        run = PaperRun(run_toml, tmp_path / "run", f"trackers.webhook=http://127.0.0.1:9/{name}")
        with pytest.raises(Exception, match=r"none\.safetensors"):
            launch(run.config, tmp_path / "run")

    assert "trackers.webhook: not that of the first launch" in caplog.text
    assert "secret" not in caplog.text


def test_wandb_is_told_when_it_is_on(run_toml, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = PaperRun(run_toml, tmp_path / "run", "trackers.wandb=offline")
    [tracker] = make_trackers(run.config, RunDir(tmp_path / "run"), wandb_id="x", step=0)
    assert isinstance(tracker, WandB)
    told = []
    monkeypatch.setattr(type(tracker._run), "alert", lambda self, **what: told.append(what))
    alerts = made()
    alerts.also_to("wandb", tracker.alert)

    alerts.step_done(step(7), SPIKE)
    alerts.let_go("wandb")
    alerts.step_done(step(8, problem="not_finite"), None)
    alerts.close()
    tracker.close()

    assert told == [{"title": "sote: spike", "text": f"sote toy/0000 step 7: {SPIKE}", "level": "WARN"}]
