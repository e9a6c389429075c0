"""Change the number of processes inside one chunk, 1 → 3 → 2, and compare with one process that nobody stopped.

Four micro-batches a step, so that three processes do not divide it; adaptive loss weights, so that a table of losses
is part of what is trained. Launches are stopped by SIGTERM once the first 20 steps after a change are made. Keys,
captions, timesteps and rates must be equal; losses of those steps within a relative 1e-5; the table at the end, too.
"""

import os
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.bench.result import Bar, Result
from scripts.bench.trained_list import is_same_list, loss_differences
from scripts.tiny_run import Launch, TinyRun, make_workspace, tiny_overrides

SIZES = (1, 3, 2)
_STEPS, _FULL_STEPS = 6, 20
_STEPS_PER_EPOCH = 5  # 18 pictures, 4 a step
_CHUNK = "real/0000"
_STOPPED = 75


@dataclass(frozen=True)
class Comparison:
    """A run whose number of processes changed, beside one that stayed alone."""

    is_same_list: bool
    differences: tuple[float, ...]
    """Per launch: the largest relative difference of a loss in the first steps after the change."""
    later_difference: float
    """The largest one of all steps."""
    table_difference: float
    """The largest relative difference of the table of losses in the final states."""
    steps: tuple[int, ...]
    """How many each launch made."""


def run(*, full: bool, data: Path | None) -> Result:
    """Measure; `data` is not used: pictures are the demo's."""
    num_steps = _FULL_STEPS if full else _STEPS
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Path(folder), sizes=SIZES, num_steps=num_steps)
    launches = list(zip(SIZES, found.differences, found.steps, strict=True))
    return Result(
        bench="elastic",
        figures={
            "wrong_lists": 0 if found.is_same_list else 1,
            **{f"steps_on_{size}": steps for size, _, steps in launches},
            **{f"loss_difference_on_{size}_in_1e_6": value * 1e6 for size, value, _ in launches},
            "loss_difference_of_all_steps_in_1e_6": found.later_difference * 1e6,
            "table_difference_in_1e_6": found.table_difference * 1e6,
        },
        bars=[
            Bar("wrong_lists", at_most=0),
            *(Bar(f"loss_difference_on_{size}_in_1e_6", at_most=10) for size in SIZES),
            Bar("table_difference_in_1e_6", at_most=10),
        ],
        full_size=full,
        peer="one process, not stopped",
        notes=[f"differences are relative, of the first {num_steps} steps of each launch, in millionths"],
    )


def compare(root: Path, *, sizes: Sequence[int], num_steps: int, settings: Sequence[str] = ()) -> Comparison:
    """Train one chunk in `root` with these numbers of processes in turn, at least `num_steps` steps each, and alone.

    settings: of the run that changes, beyond those of both.
    """
    from scripts.demo_models.stage_c import make_stage_c_models

    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    make_workspace(root / "workspace", num_chunks=1)
    make_stage_c_models(root / "models", seed=7)
    # A stop comes a few steps late, and the last launch needs its steps, too.
    epochs = -(-len(sizes) * (num_steps + 4) // _STEPS_PER_EPOCH)
    overrides = [
        *tiny_overrides(root / "workspace", root / "models"), f"data.epochs={epochs}", "preview.prompts=[]",
        "stage_c.loss_weighting='adaptive'", "save.every_steps=1000",
    ]  # fmt: skip
    alone, changed = TinyRun(root / "alone", overrides), TinyRun(root / "changed", [*overrides, *settings])
    _require([alone.train("--chunk", _CHUNK)], 0, [alone.log])
    starts = []
    for number, size in enumerate(sizes):
        starts.append(len(changed.rows("trace.jsonl")))
        launches = changed.launch_on(size, "--chunk", _CHUNK)
        if is_last := number == len(sizes) - 1:
            codes = [launch.wait(600) for launch in launches]
        else:
            codes = _stop_at(changed, launches, step=starts[-1] + num_steps)
        _require(codes, 0 if is_last else _STOPPED, [launch.log for launch in launches])
    return _comparison(changed, alone, starts, num_steps=num_steps)


def _stop_at(run: TinyRun, launches: list[Launch], *, step: int) -> list[int]:
    """Ask all processes to stop once so many steps are made; return their exit codes."""
    first, *others = launches
    codes = [first.kill_when(lambda: run.last_step() >= step, signal.SIGTERM)]
    return codes + [launch.wait() for launch in others]


def _require(codes: list[int], wanted: int, logs: list[Path]) -> None:
    if set(codes) != {wanted}:
        texts = "\n".join(log.read_text()[-2_000:] for log in logs)
        raise RuntimeError(f"exit codes {codes} instead of {wanted}:\n{texts}")


def _comparison(changed: TinyRun, alone: TinyRun, starts: list[int], *, num_steps: int) -> Comparison:
    rows, expected = changed.rows("trace.jsonl"), alone.rows("trace.jsonl")
    if not is_same_list(rows, expected):
        nothing = float("inf")
        return Comparison(False, (nothing,) * len(starts), nothing, nothing, (0,) * len(starts))
    differences = loss_differences(rows, expected)
    ends = [*starts[1:], len(rows)]
    if min(end - start for start, end in zip(starts, ends, strict=True)) < num_steps:
        raise RuntimeError(f"launches began at steps {starts} of {len(rows)}: fewer than {num_steps} are compared")
    return Comparison(
        is_same_list=True,
        differences=tuple(max(differences[start : start + num_steps]) for start in starts),
        later_difference=max(differences),
        table_difference=_table_difference(changed, alone),
        steps=tuple(end - start for start, end in zip(starts, ends, strict=True)),
    )


def _table_difference(changed: TinyRun, alone: TinyRun) -> float:
    from training.state_folder import load_state

    ours, theirs = (load_state(one.root / "chunks" / _CHUNK / "final").component("recipe") for one in (changed, alone))
    assert ours.keys() == theirs.keys()
    return max(float(((ours[name] - theirs[name]).abs() / theirs[name].abs()).max()) for name in ours)
