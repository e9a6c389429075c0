"""Kill runs whose model lies in parts on two processes, at random moments: FSDP2, and DeepSpeed ZeRO-2.

As `kill`, with one of two processes killed by SIGKILL, or both asked by SIGTERM. Half of the runs stay on two
processes; the others change between one and two from launch to launch. All must train the list of an undisturbed run on
two processes, with the same losses within a relative 1e-5. That run is compared with one process that has everything.

DeepSpeed compiles a C++ extension at its first use, once: a minute, kept in TORCH_EXTENSIONS_DIR.
"""

import importlib.util
import shutil
import tempfile
from pathlib import Path

from scripts.bench.kill import Account, Way, measure
from scripts.bench.result import Bar, Result
from scripts.bench.trained_list import is_same_list, loss_differences
from scripts.tiny_run import TinyRun, tiny_overrides

_KILLS, _FULL_KILLS = 3, 20
STRATEGIES = ("fsdp2", "zero2")


def run(*, full: bool, data: Path | None) -> Result:
    """Measure; `data` is not used: pictures are the demo's."""
    figures: dict[str, float] = {}
    bars: list[Bar] = []
    notes: list[str] = []
    for strategy in STRATEGIES:
        if problem := missing_for(strategy):
            notes.append(f"{strategy} was not run: {problem}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            account = measure_strategy(Path(folder), strategy, num_kills=_FULL_KILLS if full else _KILLS, seed=0)
            difference = difference_from_one_process(Path(folder), strategy)
        own = {
            "kills": account.kills.total(),
            "of_these_sigterm": account.num_sigterm,
            **{f"while_{moment}": number for moment, number in sorted(account.kills.items())},
            "runs": account.num_runs,
            "wrong_lists": len(account.wrong_lists),
            "sigterms_without_code_or_state": len(account.bad_exits),
            "loss_difference_from_one_process_in_1e_6": difference * 1e6,
        }
        figures |= {f"{strategy}_{name}": value for name, value in own.items()}
        zero = ("wrong_lists", "sigterms_without_code_or_state")
        bars += [Bar(f"{strategy}_{name}", at_most=0) for name in zero]
        bars.append(Bar(f"{strategy}_loss_difference_from_one_process_in_1e_6", at_most=10))
        notes.append(f"{strategy}: an undisturbed launch over all chunks takes {account.seconds:.1f} s")
        notes += [f"{strategy}: {problem}" for problem in account.problems]
    peer = "the same runs, not disturbed; one process"
    is_whole = full and not any(map(missing_for, STRATEGIES))
    return Result("kill_in_parts", figures, bars, full_size=is_whole, peer=peer, notes=notes)


def missing_for(strategy: str) -> str:
    """Return what this machine lacks for a strategy, or ""."""
    if strategy == "fsdp2":
        return ""
    if importlib.util.find_spec("deepspeed") is None:
        return "DeepSpeed is not installed"
    return "" if shutil.which("g++") else "there is no g++, which DeepSpeed needs on a CPU"


def measure_strategy(root: Path, strategy: str, *, num_kills: int, seed: int) -> Account:
    """Disturb runs of a strategy in `root`; see `kill.measure`."""
    settings = _settings(strategy)
    ways = (Way((2,), settings), Way((1, 2), settings))
    return measure(root, num_kills=num_kills, seed=seed, ways=ways, undisturbed=ways[0])


def difference_from_one_process(root: Path, strategy: str) -> float:
    """Return the largest relative difference of a loss between the undisturbed run in `root` and one process alone.

    Infinite when they did not train the same list.
    """
    whole = TinyRun(root / "whole", [])
    settings = [one for one in _settings(strategy) if not one.startswith("parallel.")]
    alone = TinyRun(root / "alone", [*tiny_overrides(root / "workspace", root / "models"), "data.epochs=1", *settings])
    if codes := [code for code in [alone.train("--chunks", ":")] if code]:
        raise RuntimeError(f"the run on one process ended with {codes}:\n{alone.log.read_text()[-4_000:]}")
    rows, expected = whole.rows("trace.jsonl"), alone.rows("trace.jsonl")
    return max(loss_differences(rows, expected)) if is_same_list(rows, expected) else float("inf")


def _settings(strategy: str) -> tuple[str, ...]:
    return (f"parallel.strategy='{strategy}'", "stage_c.gradient_checkpointing=true")
