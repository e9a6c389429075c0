import logging
import os
import signal

import pytest

from tests.training.paper_run import PaperRun
from training.launch import launch
from training.stop import StopRequest


def test_nothing_asks_to_stop():
    with StopRequest(lambda: False) as stop:
        assert (stop.poll(), stop.poll_signals()) == ("", "")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_is_remembered_and_the_old_handler_comes_back(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)

    with StopRequest(lambda: False) as stop:
        os.kill(os.getpid(), number)
        reasons = (stop.poll(), stop.poll_signals())

    assert reasons == (name, name)
    assert signal.getsignal(number) is before


def test_the_stop_file_is_looked_for_only_by_the_rank_that_does_it_for_all():
    looked = []

    with StopRequest(lambda: bool(looked.append(1)) or True) as stop:
        assert stop.poll_signals() == "" and looked == []
        assert stop.poll() == "stop file"
        assert stop.poll() == "stop file" and looked == [1]


def test_a_second_ctrl_c_means_it():
    with pytest.raises(KeyboardInterrupt), StopRequest(lambda: False):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("own_accelerator")
def test_a_stop_file_from_before_a_launch_is_removed_aloud(run_toml, tmp_path, caplog):
    run = PaperRun(run_toml, tmp_path / "run")
    run.run_dir.request_stop()

    with caplog.at_level(logging.WARNING), pytest.raises(Exception, match=r"none\.safetensors"):
        launch(run.config, tmp_path / "run")

    assert "written before this launch; removed" in caplog.text
    assert not run.run_dir.stop_requested()
