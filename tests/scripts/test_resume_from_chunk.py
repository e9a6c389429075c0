"""What resume_from_chunk finds and says after everything that can happen to a run; launches are stand-ins."""

import json
import shutil

import pytest

from scripts import resume_from_chunk
from tests.training.conftest import RUN_TOML, make_chunk
from tests.training.paper_run import PaperRun
from training.frozen_config import to_toml
from training.lock import RunLock
from training.rewind import rewind
from training.run_dir import RunDir

FIRST, SECOND, THIRD = "made/0000", "made/0001", "made/0002"
BEFORE = "1 chunks are done; starting chunk made/0001 (2 of 3) from the state of made/0000."


class Killed(BaseException):
    """Stands for SIGKILL."""


def new_run(root):
    for number in range(3):
        make_chunk(root / "workspace", number)
    toml = root / "run.toml"
    toml.write_text(RUN_TOML.format(workspace=root / "workspace").replace("batch_size = 4", "batch_size = 1"))
    toml.write_text(toml.read_text().replace("micro_batch_size = 2", "micro_batch_size = 1"))
    run = PaperRun(toml, root / "run", "save.keep_chunks=9")
    run.run_dir.config_path.write_text(to_toml(run.config.model_dump(mode="json")))
    run.run_dir.update_run_json(folder=str((root / "run").resolve()))
    return run


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """One of three chunks is done, the second was killed at its fourth step: states of the second and third."""
    run = new_run(tmp_path_factory.mktemp("paper"))
    step = run.step

    def step_or_die(planned, before):
        if before.global_step == 7:
            raise Killed
        return step(planned, before)

    run.step = step_or_die
    with pytest.raises(Killed):
        run.train_all()
    return run


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    run = new_run(tmp_path_factory.mktemp("paper"))
    run.train_all()
    return run


@pytest.fixture
def launched(monkeypatch):
    """The launches that were started instead of trainings."""
    calls = []
    monkeypatch.setattr(resume_from_chunk, "launch_chunk", lambda *arguments: calls.append(arguments) or 75)
    return calls


def copy_of(run, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(run.run_dir.root, root)
    RunDir(root).update_run_json(folder=str(root.resolve()))
    return root


def ledger(root):
    return RunDir(root).open_ledger(guard=lambda: None)


def said(root, capsys, *extra):
    """The sentence, of a dry run, without the folder; it is one."""
    assert resume_from_chunk.main(["--run-dir", str(root), "--dry-run", *extra]) == 0
    out = capsys.readouterr().out.strip()
    assert out.startswith(f"{root}: ") and "\n" not in out and ". " not in out
    return out.removeprefix(f"{root}: ")


def error(capsys, *words):
    code = resume_from_chunk.main([str(word) for word in words])
    return code, capsys.readouterr().err


def spoil(state):
    path = state / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")


def test_half_a_chunk(half, tmp_path, capsys, launched):
    root = copy_of(half, tmp_path)

    assert said(root, capsys) == ("chunk made/0001 (2 of 3) is half trained; going on from its state at global step 7.")
    assert resume_from_chunk.main(["--run-dir", str(root), "--set", "save.keep_chunks=3"]) == 75  # the launch's code
    assert launched == [("", root / "run.toml", root, SECOND, ["--set", "save.keep_chunks=3"])]


def test_a_damaged_newest_state_is_passed_over_by_name(half, tmp_path, capsys):
    root = copy_of(half, tmp_path)
    spoil(RunDir(root).state_folder(SECOND, 7))

    words = said(root, capsys)

    assert words.startswith("chunk made/0001 (2 of 3) is half trained; damaged and passed over: state-00000007 (")
    assert words.endswith("; going on from the newest verified one at global step 6.")


def test_when_no_state_is_whole_it_says_to_which_chunk_to_go_back(half, tmp_path, capsys):
    root = copy_of(half, tmp_path)
    for state in RunDir(root).state_folders(SECOND):
        spoil(state)

    code, words = error(capsys, "--run-dir", root)
    assert code == 3
    assert "go back to the end of chunk made/0000, whose state is whole, with `--rewind made/0000`" in words

    assert resume_from_chunk.main(["--run-dir", str(root), "--rewind", FIRST, "--no-launch"]) == 0
    assert "starting chunk made/0001" in capsys.readouterr().out


def test_a_launch_that_failed_was_stopped_or_killed(half, tmp_path, capsys):
    root = copy_of(half, tmp_path)

    ledger(root).append("failed", chunk=SECOND, global_step=7, reason="NonFiniteError: loss is nan\nat step 7")
    assert said(root, capsys).startswith(
        "the last launch failed (NonFiniteError: loss is nan at step 7); chunk made/0001 (2 of 3) is half trained;"
    )
    ledger(root).append("stopped", chunk=SECOND, global_step=7, reason="SIGTERM")
    assert said(root, capsys).startswith("the last launch was stopped (SIGTERM); chunk made/0001")

    lines = RunDir(half.run_dir.root).ledger_path.read_bytes()
    (root / "ledger.jsonl").write_bytes(lines)
    lock = RunLock.acquire(root / "lock")
    claim = root / "fence" / f"{lock.number:06d}"
    holder = json.loads(claim.read_text())
    lock.release()
    claim.with_name(f"{claim.name}.released").unlink()
    holder["launch"] |= {"process_start": "1"}
    claim.write_text(json.dumps(holder))
    assert "the last launch was killed (" in said(root, capsys)


def test_another_launch_at_work_is_named_and_nothing_is_started(half, tmp_path, capsys, launched):
    root = copy_of(half, tmp_path)

    with RunLock.acquire(root / "lock") as lock:
        for more in ((), ("--dry-run",), ("--rewind", FIRST)):
            code, words = error(capsys, "--run-dir", root, *more)
            assert code == 2
            assert f"process {lock.holder.launch.pid} on {lock.holder.launch.host}" in words
    assert launched == []


def test_finished_extended_and_superseded(done, tmp_path, capsys):
    root = copy_of(done, tmp_path)
    assert said(root, capsys) == "all 3 chunks are done; nothing to do."

    assert said(root, capsys, "--set", "data.epochs=2") == (
        "the run is extended (data.epochs 1 -> 2); 0 chunks are done; starting chunk made/0000 (1 of 3) again, from "
        "epoch 1 on, from the state of made/0002."
    )
    rewind(root, FIRST, reason="captions were wrong")
    assert said(root, capsys) == f"made/0001 to made/0002 (2 chunks) were superseded (captions were wrong); {BEFORE}"


def test_a_run_folder_that_was_moved_goes_on(half, tmp_path, capsys):
    root = copy_of(half, tmp_path)
    moved = tmp_path / "elsewhere"
    root.rename(moved)

    assert said(moved, capsys).startswith(f"the run folder was moved here from {root.resolve()}; chunk made/0001")


def test_a_run_that_never_started(tmp_path, capsys):
    code, words = error(capsys, "--run-dir", tmp_path / "none")
    assert (code, "no run.toml; start it with" in words) == (2, True)

    root = new_run(tmp_path).run_dir.root
    assert said(root, capsys) == (
        "0 chunks are done; starting chunk made/0000 (1 of 3) from the weights that run.toml names."
    )


def test_a_setting_that_may_not_change_is_refused_before_anything_starts(half, tmp_path, capsys, launched):
    code, words = error(capsys, "--run-dir", half.run_dir.root, "--set", "seed=8")

    assert (code, launched) == (2, [])
    assert "seed: was 0, now 8" in words


def test_a_rewind_says_what_it_does_and_goes_on(done, tmp_path, capsys, launched):
    root = copy_of(done, tmp_path)
    before = (root / "ledger.jsonl").read_bytes()

    assert said(root, capsys, "--rewind", FIRST) == (
        "would go back to the end of chunk made/0000, global step 4; superseded: made/0001, made/0002."
    )
    assert (root / "ledger.jsonl").read_bytes() == before
    assert resume_from_chunk.main(["--run-dir", str(root), "--rewind", FIRST]) == 75
    assert capsys.readouterr().out.splitlines()[-1].endswith(BEFORE)
    assert [call[3] for call in launched] == [SECOND]


def test_a_rewind_that_was_killed_is_said_to_be_finished_first(done, tmp_path, capsys, monkeypatch):
    root = copy_of(done, tmp_path)

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("training.set_aside.trim_metrics", killed)
        with pytest.raises(Killed):
            rewind(root, FIRST, reason="r")

    assert said(root, capsys) == f"a rewind to made/0000 was killed half-way and is finished first; {BEFORE}"


def test_a_branch_prints_the_differences_and_goes_on_in_its_own_folder(done, tmp_path, capsys, launched):
    new = tmp_path / "new"
    words = ["--run-dir", str(done.run_dir.root), "--chunk", FIRST, "--fork", str(new), "--set", "seed=8"]

    assert resume_from_chunk.main([*words, "--dry-run"]) == 0
    assert not new.exists()
    assert resume_from_chunk.main(words) == 75

    lines = capsys.readouterr().out.splitlines()
    assert f"{new}: a branch of {done.run_dir.root} from the end of chunk made/0000, global step 4" in lines[0]
    assert lines[1] == "  seed: 0 there, 8 here"
    assert lines[-1] == f"{new}: a branch of {done.run_dir.root} from the end of made/0000; {BEFORE}"
    assert launched == [("", new / "run.toml", new, SECOND, [])]


@pytest.mark.parametrize(
    "words",
    [
        ["--fork", "x"], ["--chunk", "made/0000"], ["--rewind", "a", "--fork", "x", "--chunk", "b"], ["--", "-n"],
        ["--submit", "--launcher", "accelerate launch"], ["--submit", "--no-launch"],
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_refused(words, capsys):
    with pytest.raises(SystemExit) as exit_:
        resume_from_chunk.main(["--run-dir", "run", *words])

    assert exit_.value.code == 2


def test_a_job_is_submitted_by_the_script_of_all_jobs(half, tmp_path, capsys, monkeypatch):
    from scripts import slurm_queue, submit_chunks

    root, calls = copy_of(half, tmp_path), []

    def submit(*arguments, **options):
        calls.append((arguments, options))
        return submit_chunks.ChunkJob(SECOND, "submitted", "12")

    monkeypatch.setattr(submit_chunks, "submit_chunk", submit)
    monkeypatch.chdir(slurm_queue.ROOT)
    assert resume_from_chunk.main(["--run-dir", str(root), "--submit", "--", "--time=1:00:00"]) == 0

    ((arguments, options),) = calls
    assert arguments == (root / "run.toml", root, SECOND)
    assert options == {"overrides": [], "sbatch_options": ["--time=1:00:00"], "dry_run": False}
    assert "submitted as job 12" in capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    assert error(capsys, "--run-dir", root, "--submit")[0] == 2
