"""A run goes back to the end of a chunk: nothing is lost, nothing in the way, also when that is killed anywhere."""

import itertools
import json
import os
import shutil

import pytest

from sharding.config import ConfigError
from sharding.files import TEMPORARY_MARK
from tests.training.conftest import RUN_TOML, make_chunk
from tests.training.paper_run import PaperRun, reopened
from training.campaign import read_campaign
from training.chunk_records import chunk_records, has_state, totals
from training.config.watching import TrackerConfig
from training.lock import LockHeldError, RunLock
from training.metrics_file import read_metrics
from training.rewind import plan_rewind, rewind
from training.run_dir import RunDir
from training.set_aside import finish_rewind, pending_rewind
from training.state_manifest import StateError
from training.trackers import make_trackers
from training.verify_run import verify_run

FIRST, SECOND, THIRD = "made/0000", "made/0001", "made/0002"


KILLED = 137


@pytest.fixture(scope="module")
def toml(tmp_path_factory):
    root = tmp_path_factory.mktemp("paper")
    for number in range(3):
        make_chunk(root / "workspace", number)
    path = root / "run.toml"
    path.write_text(RUN_TOML.format(workspace=root / "workspace").replace("batch_size = 4", "batch_size = 2"))
    return path


@pytest.fixture(scope="module")
def trained(toml, tmp_path_factory):
    """Three chunks, all final states kept, charts in TensorBoard."""
    run = PaperRun(
        toml, tmp_path_factory.mktemp("trained") / "run", "save.keep_chunks=9", "trackers.tensorboard=true", skip=(2,)
    )
    run.train_all()
    return run


@pytest.fixture
def copy(trained, tmp_path):
    shutil.copytree(trained.run_dir.root, tmp_path / "run")
    return tmp_path / "run"


def steps(path):
    return [row["global_step"] for row in read_metrics(path) if "step" in row]


def charted(root):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(root / "tensorboard"))
    events.Reload()
    return sorted(
        event.step for event in events.Scalars("train/loss")
    )  # files of one process and second have any order


def tree(root):
    """Every file of a run but those that hold times, and half-written ones, with its bytes."""
    left_out = ("ledger.jsonl", "run.json", "lock", "fence", "tensorboard")
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    names = ((path.relative_to(root).as_posix(), path) for path in files)
    return {
        "/".join(part for part in name.split("/") if not part.startswith("2")): path.read_bytes()
        for name, path in names
        if not any(part in left_out for part in name.split("/")) and TEMPORARY_MARK not in name
    }


def test_the_later_chunks_are_superseded_and_can_be_trained_anew(trained, copy):
    before = tree(copy)

    told = rewind(copy, FIRST, reason="rewind to made/0000, asked for by me")

    run_dir = RunDir(copy)
    (line,) = [line for line in run_dir.read_ledger() if line.event == "superseded"]
    (aside,) = (copy / "superseded").iterdir()
    end = totals(run_dir.read_ledger()).global_step
    assert line.fields["chunks"] == [SECOND, THIRD]
    assert told[0].endswith(f"back to the end of chunk {FIRST}, global step {end}; superseded: {SECOND}, {THIRD}")
    assert verify_run(trained.config, copy).problems == []
    assert steps(copy / "metrics.jsonl") == list(range(1, end + 1))
    assert steps(aside / "metrics.jsonl") == list(range(end + 1, 3 * end + 1))
    assert not list((copy / "chunks" / "made").glob("000[12]"))
    kept = {name.replace("superseded/", ""): data for name, data in tree(copy).items() if "superseded/" in name}
    for name, data in before.items():
        assert tree(copy).get(name) == data or kept.get(name) == data or name.endswith(".jsonl") or "trackers" in name

    again = reopened(trained, copy)
    again.train_all()

    proof = verify_run(again.config, copy)
    assert (proof.problems, proof.num_chunks, proof.trained) == ([], 3, 10)
    assert steps(copy / "metrics.jsonl") == charted(copy) == list(range(1, 3 * end + 1))
    assert totals(run_dir.read_ledger()).images_seen == totals(trained.ledger.lines).images_seen


def rewind_killed_before_act(number, root):
    """Go back in a process that ends, as by SIGKILL, before its n-th rename or fsync; return whether it was killed."""
    pid = os.fork()
    if pid == 0:
        acts = itertools.count()
        for name in ("replace", "fsync"):
            act = getattr(os, name)
            setattr(os, name, lambda *args, act=act: os._exit(KILLED) if next(acts) == number else act(*args))
        rewind(root, FIRST, reason="r")
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == KILLED


def test_a_rewind_that_is_killed_between_any_two_acts_is_finished_by_the_next_launch(trained, tmp_path):
    whole = tmp_path / "whole"
    shutil.copytree(trained.run_dir.root, whole)
    rewind(whole, FIRST, reason="r")
    num_begun = num_told = 0
    for number in itertools.count():
        root = tmp_path / f"killed-{number}"
        shutil.copytree(trained.run_dir.root, root)
        if not rewind_killed_before_act(number, root):
            break
        run_dir = RunDir(root)
        is_begun = pending_rewind(run_dir.read_ledger()) is not None
        num_begun += is_begun
        if is_begun and not num_told:
            num_told += "killed half-way" in str(verify_run(trained.config, root).problems)

        if number % 2 or not is_begun:
            rewind(root, FIRST, reason="r")
        else:  # as `training.launch` does
            finish_rewind(run_dir, run_dir.open_ledger(guard=lambda: None))

        assert pending_rewind(run_dir.read_ledger()) is None
        assert tree(root) == tree(whole)
        shutil.rmtree(root)
    assert num_begun > 10 and num_told == 1
    assert verify_run(trained.config, whole).problems == []


def test_wandb_goes_on_under_a_new_id_that_names_the_old_one(trained, copy, monkeypatch):
    run_dir = RunDir(copy)
    old = run_dir.update_run_json()["wandb_id"]
    positions = json.loads(run_dir.trackers_path.read_text())
    run_dir.trackers_path.write_text(json.dumps({**positions, "wandb": {"fed": 6, "asked": 6}}))
    run_dir.wandb_folder.mkdir()

    told = rewind(copy, FIRST, reason="r")

    now = run_dir.read_run_json()
    (aside,) = (copy / "superseded").iterdir()
    assert now["wandb_id"] != old and now["wandb_id"].startswith(now["run_id"])
    assert now["wandb_ids_before"] == [old]
    assert (aside / "wandb").is_dir()
    assert any(f"new id, {now['wandb_id']}" in line for line in told)
    assert json.loads(run_dir.trackers_path.read_text()) == {}

    made = []
    monkeypatch.setattr("training.trackers.WandB", lambda *_, **options: made.append(options))
    config = trained.config.model_copy(update={"trackers": TrackerConfig(tensorboard=False, wandb="offline")})
    make_trackers(config, run_dir, wandb_id=now["wandb_id"], step=2)
    assert made[0]["config"]["wandb_ids_before"] == [old]


def test_going_back_twice_and_to_the_newest_chunk(trained, copy):
    rewind(copy, FIRST, reason="first")
    assert "nothing was trained after it" in plan_rewind(copy, FIRST)
    assert "nothing was trained after it" in rewind(copy, FIRST, reason="again")[0]

    reopened(trained, copy).train_all()
    rewind(copy, SECOND, reason="second")

    lines = RunDir(copy).read_ledger()
    assert [line.fields["chunks"] for line in lines if line.event == "superseded"] == [[SECOND, THIRD], [THIRD]]
    assert verify_run(trained.config, copy).problems == []
    assert plan_rewind(copy, FIRST).endswith(f"superseded: {SECOND}.")


def test_a_chunk_trained_again_in_later_epochs_is_what_it_was_before(toml, tmp_path):
    run = PaperRun(toml, tmp_path / "run", "data.epochs=1", "save.keep_chunks=9")
    run.train_all()
    run.config = run.config.model_copy(update={"data": run.config.data.model_copy(update={"epochs": 2})})
    run.train_all()
    end = chunk_records(run.ledger.lines)[SECOND].last_state.global_step

    rewind(tmp_path / "run", SECOND, reason="r")

    records = chunk_records(run.run_dir.read_ledger())
    assert [(one.chunk, one.status, one.epochs) for one in records.values()] == [
        (FIRST, "done", 2), (SECOND, "done", 2), (THIRD, "done", 1),
    ]  # fmt: skip
    assert totals(run.run_dir.read_ledger()).global_step == end
    assert verify_run(run.config, run.run_dir.root).problems == []

    again = reopened(run, run.run_dir.root)
    again.train_all()
    assert verify_run(run.config, run.run_dir.root).problems == []
    assert steps(run.run_dir.metrics_path) == list(range(1, 13))


def test_a_state_that_was_superseded_has_no_line_any_more(copy):
    lines = RunDir(copy).read_ledger()
    digests = [line.fields["manifest_digest"] for line in lines if line.event == "chunk_done"]

    rewind(copy, FIRST, reason="r")

    lines = RunDir(copy).read_ledger()
    assert [has_state(lines, digest) for digest in digests] == [True, False, False]


def test_what_cannot_be_gone_back_to_is_refused_and_says_what_can(copy, trained):
    final = RunDir(copy).final_folder(FIRST)
    before = tree(copy)
    with pytest.raises(
        ConfigError, match=r"chunk made/0009: it is not done in .*; final states are kept of: made/0000"
    ):
        rewind(copy, "made/0009", reason="r")

    with RunLock.acquire(copy / "lock"), pytest.raises(LockHeldError, match="in use by process"):
        rewind(copy, FIRST, reason="r")

    data = (final / "model.safetensors").read_bytes()
    (final / "model.safetensors").write_bytes(data[:-1] + b"\1")
    with pytest.raises(StateError, match="SHA-256"):
        rewind(copy, FIRST, reason="r")
    (final / "model.safetensors").write_bytes(data)
    assert tree(copy) == before

    shutil.rmtree(final)
    with pytest.raises(ConfigError, match=r"its final state is gone \(save.keep_chunks.*kept of: made/0001, made/0002"):
        rewind(copy, FIRST, reason="r")


def test_the_campaign_goes_on_with_the_first_superseded_chunk(copy, trained):
    rewind(copy, FIRST, reason="r")

    data = trained.config.data
    assert read_campaign(data.workspace, data.chunks, RunDir(copy)).next == SECOND
