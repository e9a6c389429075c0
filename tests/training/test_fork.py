"""A branch begins where a chunk of another run ended, and each part is proved with the settings it was trained with."""

import shutil

import pytest

from sharding.config import ConfigError
from tests.training.conftest import RUN_TOML, make_chunk
from tests.training.paper_run import PaperRun, reopened
from training.chunk_records import totals
from training.fork import make_fork, plan_fork
from training.frozen_config import to_toml
from training.metrics_file import read_metrics
from training.rewind import rewind
from training.run_dir import RunDir
from training.state_manifest import StateError
from training.verify_run import verify_run

FIRST, SECOND, THIRD = "made/0000", "made/0001", "made/0002"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three chunks, all final states kept."""
    root = tmp_path_factory.mktemp("paper")
    for number in range(3):
        make_chunk(root / "workspace", number)
    toml = root / "run.toml"
    toml.write_text(RUN_TOML.format(workspace=root / "workspace").replace("batch_size = 4", "batch_size = 2"))
    run = PaperRun(toml, root / "run", "save.keep_chunks=9", skip=(2,))
    run.run_dir.config_path.write_text(to_toml(run.config.model_dump(mode="json")))
    run.train_all()
    return run


@pytest.fixture
def parent(trained, tmp_path):
    shutil.copytree(trained.run_dir.root, tmp_path / "parent")
    return tmp_path / "parent"


def files(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def fork(parent, root, *overrides, chunk=FIRST):
    planned = plan_fork(parent, chunk, root, overrides=overrides)
    make_fork(planned)
    return planned


def test_a_branch_with_other_settings_goes_on_from_the_chunk_and_is_proved(trained, parent, tmp_path):
    before = files(parent)

    planned = fork(parent, tmp_path / "fork", "batch.batch_size=4", "seed=5")
    branch = reopened(trained, tmp_path / "fork", config=planned.config)
    at_start = totals(branch.ledger.lines)
    branch.train_all()

    proof = verify_run(planned.config, tmp_path / "fork")
    assert proof.problems == []
    assert "made/0000 and what came before it was trained in" in proof.notes[0]
    assert files(parent) == before
    assert (at_start.global_step, at_start.images_seen) == (2, 2)
    rows = [row for row in read_metrics(branch.run_dir.metrics_path) if "step" in row]
    assert [(row["global_step"], row["chunk"]) for row in rows] == [(1, FIRST), (2, FIRST), (3, SECOND), (4, THIRD)]
    assert rows[-1]["train/images_seen"] == 2 + 8
    assert [line for line in planned.text() if "batch_size" in line] == ["  batch.batch_size: 2 there, 4 here"]
    assert verify_run(trained.config, parent).problems == []


def test_the_ledger_says_where_a_branch_comes_from_and_its_state_takes_no_room(parent, tmp_path):
    run_dir, branch = RunDir(parent), RunDir(tmp_path / "fork")
    run_dir.update_run_json()

    fork(parent, branch.root, "name='other'")

    last = branch.read_ledger()[-1]
    assert branch.read_ledger()[:-1] == run_dir.read_ledger()[: last.number]
    done = run_dir.read_ledger()[last.number - 1].fields
    assert (last.event, last.fields["chunk"]) == ("forked", FIRST)
    assert last.fields["run_id"] == run_dir.read_run_json()["run_id"] != branch.read_run_json()["run_id"]
    assert last.fields["manifest_digest"] == done["manifest_digest"]
    assert last.fields["changed"] == {"name": ["tiny", "other"]}
    for name in ("model.safetensors", "manifest.json"):
        assert (branch.final_folder(FIRST) / name).samefile(run_dir.final_folder(FIRST) / name)
    assert [path.name for path in branch.state_folders()] == ["final"]
    assert branch.read_run_json()["run_id"].startswith("fork-")


def test_where_no_hard_link_can_be_made_files_are_copied(parent, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr("os.link", refuse)
    fork(parent, tmp_path / "fork")

    here, there = (RunDir(root).final_folder(FIRST) for root in (tmp_path / "fork", parent))
    assert files(here) == files(there)
    assert not (here / "manifest.json").samefile(there / "manifest.json")


def test_a_branch_of_a_branch_and_a_rewind_in_it_are_proved(trained, parent, tmp_path):
    planned = fork(parent, tmp_path / "one", "batch.batch_size=4")
    reopened(trained, tmp_path / "one", config=planned.config).train_all()

    planned = fork(tmp_path / "one", tmp_path / "two", "seed=9", chunk=SECOND)
    two = reopened(trained, tmp_path / "two", config=planned.config)
    two.train_all()
    rewind(two.run_dir.root, SECOND, reason="r")
    reopened(trained, two.run_dir.root, config=planned.config).train_all()

    assert verify_run(planned.config, two.run_dir.root).problems == []
    assert len(verify_run(planned.config, two.run_dir.root).notes) == 2


def test_a_branch_with_more_epochs_trains_what_it_took_over_again_and_is_proved(trained, parent, tmp_path):
    planned = fork(parent, tmp_path / "fork", "data.epochs=2", "seed=5", chunk=SECOND)
    branch = reopened(trained, tmp_path / "fork", config=planned.config)
    assert branch.campaign().next == FIRST

    branch.train_all()

    proof = verify_run(planned.config, tmp_path / "fork")
    rows = [row for row in read_metrics(branch.run_dir.metrics_path) if "step" in row]
    assert (proof.problems, proof.planned) == ([], 24)
    assert list(dict.fromkeys((row["chunk"], row["epoch"]) for row in rows)) == [
        (FIRST, 0), (SECOND, 0), (FIRST, 1), (SECOND, 1), (THIRD, 0), (THIRD, 1),
    ]  # fmt: skip
    assert [row["global_step"] for row in rows] == list(range(1, 13))


def test_what_cannot_be_branched_off_is_refused_and_leaves_nothing(parent, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(ConfigError, match="used: is there already and not empty"):
        plan_fork(parent, FIRST, tmp_path / "used")
    with pytest.raises(ConfigError, match="final states are kept of: made/0000, made/0001, made/0002"):
        plan_fork(parent, "made/0009", tmp_path / "fork")
    with pytest.raises(ConfigError, match="learning_rate"):
        plan_fork(parent, FIRST, tmp_path / "fork", overrides=["optimizer.learning_rate=-1"])
    with pytest.raises(FileNotFoundError, match="no run was started"):
        plan_fork(tmp_path / "none", FIRST, tmp_path / "fork")

    path = RunDir(parent).final_folder(FIRST) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    planned = plan_fork(parent, FIRST, tmp_path / "fork")
    with pytest.raises(StateError, match="SHA-256"):
        make_fork(planned)
    assert not (tmp_path / "fork").exists()


def test_a_branch_that_was_killed_while_it_was_made_is_made_anew(parent, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("training.fork.verify_state", killed)
        with pytest.raises(Killed):
            fork(parent, tmp_path / "fork")
    assert not (tmp_path / "fork").exists()

    fork(parent, tmp_path / "fork")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["fork", "parent"]
