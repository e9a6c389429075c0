import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sharding.files import (
    LOCK,
    DiskFullError,
    digest_of,
    locked,
    open_replacing,
    remove_temporaries,
    replacing,
    require_free_bytes,
    sha256_file,
    temporary_name,
    write_bytes,
    write_json,
)


def test_a_file_appears_whole_in_new_folders(tmp_path):
    path = tmp_path / "a" / "b" / "c.bin"

    write_bytes(path, b"data")

    assert path.read_bytes() == b"data"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), OSError(errno.EIO, "no")])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    write_bytes(path, b"old")

    with pytest.raises(type(error)), open_replacing(path) as stream:
        stream.write(b"half")
        raise error

    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_named(tmp_path):
    with (
        pytest.raises(DiskFullError, match=r"disk full while writing .*file: free some space"),
        replacing(tmp_path / "file"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_json_is_strict_and_readable(tmp_path):
    write_json(tmp_path / "x.json", {"b": "é", "a": 1})

    assert (tmp_path / "x.json").read_text(encoding="utf-8") == '{\n  "b": "é",\n  "a": 1\n}\n'
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["a"] == 1


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    write_bytes(tmp_path / "whole", b"x")
    left = temporary_name(tmp_path / "whole")
    left.write_bytes(b"half")
    folder = temporary_name(tmp_path / "state")
    (folder / "inner").mkdir(parents=True)

    assert remove_temporaries(tmp_path, min_age_seconds=60) == []
    os.utime(left, (0, 0))
    assert remove_temporaries(tmp_path, min_age_seconds=60) == [left]
    assert remove_temporaries(tmp_path) == [folder]
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    assert remove_temporaries(tmp_path / "absent") == []


def test_no_two_writers_get_the_same_temporary_name_even_with_the_same_process_id(tmp_path):
    assert len({temporary_name(tmp_path / "x") for _ in range(100)}) == 100


def test_a_file_that_its_writer_finishes_meanwhile_is_not_a_left_over(tmp_path, monkeypatch):
    gone = temporary_name(tmp_path / "x")
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [gone])

    assert remove_temporaries(tmp_path, min_age_seconds=60) == []


def test_digests_do_not_depend_on_the_order_of_keys(tmp_path):
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1}) != digest_of({"a": 1, "b": [3]})
    with pytest.raises(TypeError):
        digest_of({"a": tmp_path})


def test_the_sha256_of_a_file(tmp_path):
    write_bytes(tmp_path / "x", b"abc")

    assert sha256_file(tmp_path / "x").startswith("ba7816bf8f01cfea")


def test_a_forecast_over_the_free_space_is_refused_for_folders_that_do_not_exist_yet(tmp_path):
    require_free_bytes(tmp_path / "not" / "there", 1, "a state")

    with pytest.raises(DiskFullError, match=r"a state needs 1,000,000\.00 TB"):
        require_free_bytes(tmp_path / "not" / "there", 10**18, "a state")


HOLDER = """
import sys
from pathlib import Path
from sharding.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_second_holder_waits_until_the_first_is_done_or_dead(tmp_path):
    first = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert first.stdout.readline() == b"held\n"
    has_lock = threading.Event()

    def hold():
        with locked(tmp_path):
            has_lock.set()

    second = threading.Thread(target=hold)
    second.start()
    assert not has_lock.wait(0.2)
    first.kill()
    assert has_lock.wait(10)
    second.join()
    first.communicate()


def test_without_locks_on_the_file_system_there_is_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path):
        pass
    assert f"{tmp_path / LOCK}: no locks here" in caplog.text


def test_a_dry_run_takes_no_lock(tmp_path):
    with locked(tmp_path / "new", dry_run=True):
        assert not (tmp_path / "new").exists()
