"""Kill a three-chunk tiny run at random moments, again and again, and compare it with one that nobody disturbed.

SIGKILL and SIGTERM by turns of a seeded coin, anywhere: while it starts, in steps, previews and saves, between chunks.
Half of the runs stay in one process, and must end with the same bits; the others change between one, two and three
processes from launch to launch, and must train the same list with the same losses within a relative 1e-5.
`kill_in_parts` does the same with a model in parts.
"""

import contextlib
import json
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from scripts.bench.result import Bar, Result
from scripts.bench.trained_list import is_same_list, loss_differences
from scripts.tiny_run import Launch, TinyRun, make_workspace, tiny_overrides
from training.state_folder import newest_verified
from training.state_manifest import read_manifest

_KILLS, _FULL_KILLS = 8, 200
_NUM_CHUNKS = 3
_STOPPED = 75
_MAX_LAUNCHES = 400
_LOSS_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Way:
    """How the launches of a run are made. sizes: numbers of processes, one is drawn for each launch."""

    sizes: tuple[int, ...]
    overrides: tuple[str, ...] = ()
    """Settings of the run, such as `parallel.strategy='fsdp2'`."""
    has_same_bits: bool = False
    """Whether weights must end bit-equal with the undisturbed run's, not losses within a relative 1e-5 only."""


WAYS = (Way((1,), has_same_bits=True), Way((1, 2, 3)))


@dataclass
class Account:
    """What happened over all runs."""

    kills: Counter[str] = field(default_factory=Counter)
    """By moment."""
    num_sigterm: int = 0
    bad_exits: list[str] = field(default_factory=list)
    """SIGTERMs after which code or state were not as promised."""
    wrong_lists: list[str] = field(default_factory=list)
    wrong_bits: list[str] = field(default_factory=list)
    num_runs: int = 0
    seconds: float = 0.0
    """How long the undisturbed run took."""

    @property
    def problems(self) -> list[str]:
        """All that was not as promised."""
        return [*self.bad_exits, *self.wrong_lists, *self.wrong_bits]


def run(*, full: bool, data: Path | None) -> Result:
    """Measure; `data` is not used: pictures are the demo's."""
    with tempfile.TemporaryDirectory() as folder:
        account = measure(Path(folder), num_kills=_FULL_KILLS if full else _KILLS, seed=0)
    return Result(
        bench="kill",
        figures={
            "kills": account.kills.total(),
            "of_these_sigterm": account.num_sigterm,
            **{f"while_{moment}": number for moment, number in sorted(account.kills.items())},
            "runs": account.num_runs,
            "wrong_lists": len(account.wrong_lists),
            "wrong_bits": len(account.wrong_bits),
            "sigterms_without_code_or_state": len(account.bad_exits),
        },
        bars=[Bar("wrong_lists", at_most=0), Bar("wrong_bits", at_most=0),
              Bar("sigterms_without_code_or_state", at_most=0)],
        full_size=full,
        peer="the same run, not disturbed",
        notes=[f"an undisturbed launch over all chunks takes {account.seconds:.1f} s", *account.problems],
    )  # fmt: skip


def measure(
    root: Path, *, num_kills: int, seed: int, ways: Sequence[Way] = WAYS, undisturbed: Way = WAYS[0]
) -> Account:
    """Disturb tiny runs of stage C in `root`; see `measure_runs`."""
    from scripts.demo_models.stage_c import make_stage_c_models

    make_workspace(root / "workspace", num_chunks=_NUM_CHUNKS)
    make_stage_c_models(root / "models", seed=7)
    overrides = [*tiny_overrides(root / "workspace", root / "models"), "data.epochs=1", "preview.every_steps=3"]

    def make(name: str, way: Way) -> TinyRun:
        return TinyRun(root / name, [*overrides, *way.overrides])

    chunks = [f"real/{number:04d}" for number in range(_NUM_CHUNKS)]
    return measure_runs(make, chunks, num_kills=num_kills, seed=seed, ways=ways, undisturbed=undisturbed)


def measure_runs(
    make: Callable[[str, Way], TinyRun],
    chunks: Sequence[str],
    *,
    num_kills: int,
    seed: int,
    ways: Sequence[Way] = WAYS,
    undisturbed: Way = WAYS[0],
) -> Account:
    """Disturb runs, launched by turns in these ways, until there were so many kills.

    make: gives a fresh run by its name. chunks: what it trains. All are compared with the run `whole`, which is
    launched `undisturbed`.
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    random, account = np.random.default_rng(seed), Account()
    whole = make("whole", undisturbed)
    Launch(whole.arguments("plan"), whole.log).wait()  # starts the server that launches are forked from
    started = time.monotonic()
    _finish(whole, whole.launch_on(undisturbed.sizes[0], "--chunks", ":"))
    account.seconds = time.monotonic() - started
    while account.kills.total() < num_kills:
        way = ways[account.num_runs % len(ways)]
        disturbed = make(f"run-{account.num_runs}", way)
        _disturb(disturbed, random, account, sizes=way.sizes, most=num_kills)
        _compare(disturbed, whole, chunks, account, has_same_bits=way.has_same_bits)
        account.num_runs += 1
    return account


def _disturb(run: TinyRun, random: np.random.Generator, account: Account, *, sizes: tuple[int, ...], most: int) -> None:
    """Launch and kill until the run is done; after `most` kills in all it is left in peace."""
    for _ in range(_MAX_LAUNCHES):
        launches = run.launch_on(int(random.choice(sizes)), "--chunks", ":")
        if account.kills.total() < most:
            deadline = time.monotonic() + random.uniform(0, account.seconds)
            while time.monotonic() < deadline and all(launch.process.is_alive() for launch in launches):
                time.sleep(0.002)
            if all(launch.process.is_alive() for launch in launches):
                _kill(run, launches, random, account)
                continue
        _finish(run, launches)
        return
    raise RuntimeError(f"{run.root.name}: not done after {_MAX_LAUNCHES} launches")


def _finish(run: TinyRun, launches: list[Launch]) -> None:
    codes = [launch.wait(600) for launch in launches]
    if any(codes):
        raise RuntimeError(f"{run.root.name}: exit codes {codes}:\n{launches[0].log.read_text()[-4_000:]}")


def _kill(run: TinyRun, launches: list[Launch], random: np.random.Generator, account: Account) -> None:
    account.kills[_moment(run)] += 1
    if random.random() < 0.5:  # one rank dies; what is left of the others is cleared away
        victim = launches[int(random.integers(len(launches)))]
        victim.send(signal.SIGKILL)
        for launch in launches:
            launch.process.join(5 if launch is not victim else 60)
            launch.send(signal.SIGKILL)
            launch.process.join()
        return
    account.num_sigterm += 1
    num_lines = len(run.rows("ledger.jsonl"))
    for launch in launches:
        with contextlib.suppress(ProcessLookupError):
            launch.send(signal.SIGTERM)
    codes = {launch.wait(120) for launch in launches}
    if codes <= {0, -signal.SIGTERM}:  # it was just done, or had not begun to listen
        return
    last_exit: dict[str, Any] = json.loads((run.root / "last_exit.json").read_text())
    has_new_lines = len(run.rows("ledger.jsonl")) > num_lines
    is_right = codes == {_STOPPED} and last_exit["code"] == _STOPPED and has_new_lines and _is_loadable(run)
    if not is_right:
        account.bad_exits.append(f"{run.root.name}: SIGTERM gave {sorted(codes)}, last_exit {last_exit['code']}")


def _is_loadable(run: TinyRun) -> bool:
    """Tell whether the newest state verifies and is the one that training stopped at."""
    steps: list[int] = [
        line["fields"]["global_step"] for line in run.rows("ledger.jsonl") if line["event"] == "stopped"
    ]
    folders = [*(run.root / "chunks").glob("*/*/state-*"), *(run.root / "chunks").glob("*/*/final")]
    states = [folder for folder in folders if ".partial-" not in folder.name]
    if not states:
        return steps[-1] == 0
    newest, _ = newest_verified(states)
    return read_manifest(newest).global_step == steps[-1]


def _moment(run: TinyRun) -> str:
    """Return roughly what the run is doing, as far as its folder tells."""
    if any((run.root / "chunks").glob("*/*/*.partial-*")):
        return "saving"
    lines = run.rows("ledger.jsonl")
    last = lines[-1]["event"] if lines else ""
    if last in ("", "stopped", "failed"):
        return "starting"
    return {"chunk_done": "between_chunks", "started": "in_first_steps"}.get(last, "in_steps_and_previews")


def _compare(run: TinyRun, whole: TinyRun, chunks: Sequence[str], account: Account, *, has_same_bits: bool) -> None:
    rows, expected = run.rows("trace.jsonl"), whole.rows("trace.jsonl")
    if has_same_bits and rows != expected:
        account.wrong_lists.append(f"{run.root.name}: trace differs")
    if not has_same_bits and not is_same_list(rows, expected):
        account.wrong_lists.append(f"{run.root.name}: list differs")
    elif not has_same_bits and (worst := max(loss_differences(rows, expected))) > _LOSS_TOLERANCE:
        account.wrong_lists.append(f"{run.root.name}: losses differ by a relative {worst:.1e}")
    for chunk in chunks:
        if has_same_bits and run.final_files(chunk) != whole.final_files(chunk):
            account.wrong_bits.append(f"{run.root.name}: weights of {chunk} differ")
