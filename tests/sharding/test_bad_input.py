"""Bad input through the command line: a clear line on stderr, the right exit code, nothing lost."""

import errno
import hashlib
import shutil
from pathlib import Path

import pytest

from sharding import cli
from sharding.chunk import list_chunks, seal


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return tmp_path_factory.mktemp("packed")


@pytest.fixture
def packed(run, write_captions, tmp_path, template):
    """Return the workspace of `run` after pack; made once and copied, times included, for each test."""
    if not (template / "ws").exists():
        for command in ("scan", "dedupe", "plan"):
            assert run(command)[0] == 0
        write_captions()
        assert run("pack")[0] == 0
        for name in ("raw", "ws"):
            shutil.copytree(tmp_path / name, template / name)
    else:
        for name in ("raw", "ws"):
            shutil.copytree(template / name, tmp_path / name, dirs_exist_ok=True)
    return tmp_path / "ws"


def error_lines(run) -> list[str]:
    return [line for line in run.err.splitlines() if not line.startswith("INFO")]


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "events.jsonl")
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- usage and settings: 2 ---


def test_a_missing_source_folder_is_named(run, tmp_path):
    (tmp_path / "raw").rename(tmp_path / "unmounted")

    assert run("scan")[0] == 2
    [line] = error_lines(run)
    assert "sources.photos.root: no such folder" in line and "mount it or correct the config" in line
    assert not (tmp_path / "ws").exists()


def test_a_source_folder_that_vanished_stops_scan_and_pack_and_loses_nothing(run, packed, tmp_path):
    before = digests(packed)
    (tmp_path / "raw").rename(tmp_path / "unmounted")

    assert run("scan")[0] == 2
    next((packed / "chunks").rglob("*.tar")).unlink()
    assert run("pack")[0] == 2
    assert "mount it or correct the config" in error_lines(run)[0]
    (tmp_path / "unmounted").rename(tmp_path / "raw")
    assert (run("scan")[0], run("pack")[0]) == (0, 0)
    assert digests(packed) == before


@pytest.mark.parametrize("content", [None, "folder", b"name = ", b"\xff\xfe"])
def test_a_config_that_cannot_be_read_is_named(tmp_path, capsys, content):
    path = tmp_path / "x.toml"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)

    assert cli.main(["plan", str(path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"{path}: " in line


def test_every_mistake_of_a_config_is_named_at_once(run, tmp_path):
    config = tmp_path / "test.toml"
    config.write_text(config.read_text() + 'seed = "three"\n[dedupe]\nradios = 3\n')

    assert run("scan")[0] == 2
    lines = error_lines(run)
    assert len(lines) == 2
    assert "test.toml: plan.seed: input should be a valid integer" in run.err and "got 'three'" in run.err
    assert "dedupe.radios: unknown key; known here: algorithm, find_crops, hash_size" in run.err
    assert not (tmp_path / "ws").exists()


def test_an_override_is_checked_like_the_file(run):
    assert run("scan", "--set", "plan.chunk_size=0")[0] == 2
    assert "plan.chunk_size: input should be greater than 0, got 0" in run.err
    assert run("scan", "--set", "plan.chunk_size")[0] == 2
    assert "expected key.path=value" in run.err


@pytest.mark.parametrize("command", ["scan", "pack"])
@pytest.mark.parametrize("share", [("2", "2"), ("-1", "2"), ("0", "0")])
def test_a_part_index_outside_is_refused(run, packed, command, share):
    before = digests(packed)

    assert run(command, "--part-index", share[0], "--num-parts", share[1])[0] == 2
    [line] = error_lines(run)
    assert f"--part-index {share[0]} is outside" in line
    assert digests(packed) == before


def test_a_workspace_or_a_stage_that_is_missing_is_named_with_what_to_run_first(run, write_captions):
    assert run("report")[0] == 2 and "run `python -m sharding scan` first" in run.err
    assert run("scan")[0] == 0
    assert run("plan")[0] == 2 and "run `python -m sharding dedupe` first" in run.err
    assert run("dedupe")[0] == 0
    assert run("pack")[0] == 2 and "run `python -m sharding plan` first" in run.err
    assert run("plan")[0] == 0
    assert run("pack")[0] == 2
    [line] = error_lines(run)
    assert "captions/default: 6 of 6 keys have no caption, first " in line
    assert "run `python -m captioning compose` first" in line


def test_a_chunk_that_does_not_exist_is_wrong_usage_and_others_are_listed(run, packed):
    assert run("verify", "--chunk", "photos/0009")[0] == 2
    [line] = error_lines(run)
    assert "--chunk photos/0009: no such chunk" in line and "there are photos/0000, photos/0001" in line


@pytest.mark.parametrize(("key", "says"), [("zz", "no such file in the sources"), ("0" * 16, "no key starts with")])
def test_an_unknown_key_is_wrong_usage(run, packed, key, says):
    assert run("show", key=[key])[0] == 2
    [line] = error_lines(run)
    assert says in line


def test_an_unknown_command_and_a_wrong_number_are_wrong_usage(run, capsys):
    assert cli.main(["frobnicate"]) == 2
    assert "invalid choice" in capsys.readouterr().err
    assert run("scan", "--workers", "-1")[0] == 2
    assert "'-1' is not a whole number from 0" in run.err


# --- damaged data: 3 ---


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_damaged_tar_is_named_with_its_sample_and_packed_again(run, packed, damage):
    before = digests(packed / "chunks")
    tar = sorted((packed / "chunks").rglob("*.tar"))[0]
    data = tar.read_bytes()
    place = data.index(b"\xff\xd8\xff") + 200  # inside the first picture
    key = tar.read_bytes()[: data.index(b".")].decode()
    tar.write_bytes(
        data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :] if damage == "flipped" else data[:place]
    )

    code, text = run("verify")
    assert code == 3
    assert f"shard {tar.name}: " in text and "damaged: delete it and run `python -m sharding pack` again" in text
    assert f"chunk photos/0000: key {key}: " in text

    if damage == "flipped":  # a cut tar is noticed without reading it
        tar.unlink()
    code, text = run("pack")
    assert code == 0 and text.startswith("1 chunks packed (4 samples), 1 current")
    assert run("verify")[0] == 0
    assert digests(packed / "chunks") == before


@pytest.mark.parametrize("name", ["chunk.json", "index-*.parquet"])
def test_a_damaged_chunk_json_or_index_says_how_to_repair_it(run, packed, name):
    before = digests(packed / "chunks")
    path = sorted((packed / "chunks" / "photos" / "0000").glob(name))[0]
    path.write_bytes(path.read_bytes()[:50])

    code, text = run("verify")
    assert code == 3 and str(path) in text and "delete it and run `python -m sharding pack`" in text
    path.unlink()
    assert run("pack")[0] == 0
    assert run("verify")[0] == 0
    assert digests(packed / "chunks") == before


def test_damaged_parts_are_made_again_by_their_stage_and_named_by_the_next(run, packed):
    before = digests(packed)
    for folder, stage, reader in (("manifest", "scan", "dedupe"), ("dedupe/kept", "dedupe", "plan")):
        part = packed / folder / "part-00000.parquet"
        part.write_bytes(part.read_bytes()[:100])

        assert run(reader)[0] == 3
        [line] = error_lines(run)
        assert f"{part}: not a readable part" in line
        assert run(stage)[0] == 0
        assert run(reader)[0] == 0
        assert digests(packed) == before


def test_a_damaged_plan_is_named_and_planned_again_around_what_is_trained(run, packed):
    before = digests(packed)
    for chunk in list_chunks(packed / "chunks"):
        seal(chunk, "run")
    plan = packed / "plan" / "part-00000.parquet"
    plan.write_bytes(b"damaged")

    for command in ("plan", "pack"):
        assert run(command)[0] == 3
        assert "plan/part-00000.parquet: not a readable part" in error_lines(run)[0]
    plan.unlink()
    assert run("plan", "--set", "plan.seed=5")[0] == 0
    code, text = run("pack")
    assert code == 0 and text.startswith("0 chunks packed (0 samples), 2 current")
    after = digests(packed)
    assert {name: after[name] for name in before if name.startswith("chunks/") and ".checked" not in name} == {
        name: digest for name, digest in before.items() if name.startswith("chunks/") and ".checked" not in name
    }


def test_too_many_broken_pictures_stop_scan_after_all_is_written(run, save, tmp_path):
    for number in range(4):
        save(f"page{number}.jpg", "<html>404</html>")

    assert run("scan", "--set", "max_broken_fraction=0.1")[0] == 3
    [line] = error_lines(run)
    assert "5 of 12 files are broken (5 not_an_image), more than max_broken_fraction = 0.1" in line
    assert len(list((tmp_path / "ws" / "manifest").glob("part-*"))) == 1
    code, text = run("scan")
    assert code == 0 and "0 parts made, 1 current" in text


def test_too_many_pictures_that_broke_since_scan_stop_pack(run, packed, tmp_path):
    before = digests(packed / "chunks" / "photos" / "0001")
    for path in (tmp_path / "raw").glob("*.jpg"):
        path.write_bytes(b"changed")

    assert run("pack", "--set", "pack.shard_size=2", "--set", "max_broken_fraction=0.1")[0] == 3
    assert "samples are unusable" in error_lines(run)[0] and "changed_since_scan" in error_lines(run)[0]
    assert digests(packed / "chunks" / "photos" / "0001") == before
    assert run("verify")[0] == 0


# --- the machine: 1 ---


def test_a_read_only_workspace_is_one_line_and_can_still_be_read(run, packed, save, paint, monkeypatch):
    save("new.jpg", paint(99))
    before = digests(packed)

    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)  # the first thing that every writer does

    assert run("scan")[0] == 1
    [line] = error_lines(run)
    assert "Read-only file system" in line and str(packed) in line
    assert [run(command)[0] for command in ("verify", "report", "dedupe", "plan", "pack")] == [0] * 5
    assert digests(packed) == before
