import io
import os
import tarfile

import pytest

import sharding.sources
from sharding.files import read_file
from sharding.sources import ChangingFileError, index_tar, stamp_file


@pytest.fixture
def write_tar(tmp_path):
    """Write a tar from (name, bytes) pairs and return its path."""

    def write(name, *members, encoding="utf-8"):
        with tarfile.open(tmp_path / name, "w", encoding=encoding, errors="surrogateescape") as archive:
            for member, data in members:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return tmp_path / name

    return write


def test_files_and_members_are_read_by_the_same_function(write_tar, tmp_path):
    write_tar("00000.tar", ("./000.jpg", b"picture"), ("000.json", b"{}"))
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "folder.tar" / "1.jpg").write_bytes(b"plain")

    assert read_file(tmp_path, "00000.tar/000.jpg") == b"picture"
    assert read_file(tmp_path / "00000.tar" / "000.jpg", max_bytes=3) == b"pic"
    assert read_file(tmp_path, "folder.tar/1.jpg") == b"plain"


@pytest.mark.parametrize("path", ["absent.jpg", "00000.tar/absent.jpg", "absent.tar/1.jpg"])
def test_what_is_not_there_is_a_missing_file(write_tar, tmp_path, path):
    write_tar("00000.tar", ("000.jpg", b"picture"))

    with pytest.raises(FileNotFoundError):
        read_file(tmp_path, path)
    assert stamp_file(f"{tmp_path}/{path}") is None


def test_a_tar_that_is_written_anew_is_read_anew(write_tar, tmp_path):
    write_tar("0.tar", ("a.jpg", b"one"))
    before = stamp_file(f"{tmp_path}/0.tar/a.jpg"), read_file(tmp_path, "0.tar/a.jpg")

    write_tar("0.tar", ("b.jpg", b"more"), ("a.jpg", b"two"))

    assert before[1] == b"one" and read_file(tmp_path, "0.tar/a.jpg") == b"two"
    assert stamp_file(f"{tmp_path}/0.tar/a.jpg") != before[0]


def test_a_cut_tar_gives_what_is_whole_and_says_so(write_tar, tmp_path):
    path = write_tar("0.tar", ("a.jpg", b"a" * 600), ("b.jpg", b"b" * 5000))
    path.write_bytes(path.read_bytes()[:3000])

    index = index_tar(path)

    assert list(index.members) == ["a.jpg", "b.jpg"] and index.problems[0][1] == "damaged_tar"
    assert read_file(tmp_path, "0.tar/a.jpg") == b"a" * 600
    with pytest.raises(OSError, match="the tar ends after"):
        read_file(tmp_path, "0.tar/b.jpg")


@pytest.mark.parametrize("damage", [b"no tar at all" * 100, b""])
def test_what_is_no_tar_is_damaged(tmp_path, damage):
    (tmp_path / "0.tar").write_bytes(damage)

    index = index_tar(tmp_path / "0.tar")

    assert not index.members and [problem[1] for problem in index.problems] == ["damaged_tar"]


def test_an_unreadable_header_in_the_middle_is_no_quiet_end(write_tar, tmp_path):
    path = write_tar("0.tar", ("a.jpg", b"a" * 100), ("b.jpg", b"b" * 100))
    data = bytearray(path.read_bytes())
    data[1024 + 150] ^= 0xFF  # the checksum of the second header
    path.write_bytes(data)

    index = index_tar(path)

    assert list(index.members) == ["a.jpg"]
    assert index.problems == (("", "damaged_tar", "no readable header at byte 1,024"),)


def test_members_that_lead_out_of_their_tar_are_not_listed(write_tar):
    path = write_tar("0.tar", ("../../evil.jpg", b"x"), ("/etc/evil.jpg", b"x"), ("caf\udce9.jpg", b"x"))

    index = index_tar(path)

    assert not index.members
    assert [reason for _, reason, _ in index.problems] == ["unsafe_name", "unsafe_name", "not_utf8_name"]


def test_a_file_overwritten_with_as_many_bytes_while_it_is_read_is_noticed(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(b"12345")
    real, calls = os.fstat, []

    def fstat(descriptor):
        status = real(descriptor)
        calls.append(descriptor)
        return type("Status", (), {"st_size": status.st_size, "st_mtime_ns": len(calls)})

    monkeypatch.setattr(sharding.sources.os, "fstat", fstat)

    with pytest.raises(ChangingFileError, match="changes while it is read"):
        read_file(tmp_path, "a.jpg")
    assert len(calls) == 4
