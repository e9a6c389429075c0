"""Kill staged DreamBooth runs at random moments, again and again, and compare each with one that nobody disturbed.

As `kill`, with a toy SD 1: two concepts with class images, a stage of UNet and text encoder, then one of the UNet
alone. Runs by turns train whole weights and adapters. All stay in one process, must end with the same bits as the
undisturbed run of their kind, and prove that every planned showing was trained exactly once.
"""

import tempfile
from pathlib import Path

from scripts.bench.kill import Account, Way, measure_runs
from scripts.bench.result import Bar, Result
from scripts.tiny_dreambooth import TWO_STAGES, make_run, make_sd
from scripts.tiny_run import Launch, TinyRun
from sharding.config import load_config
from training.config import RunConfig
from training.verify_run import verify_run

_KILLS, _FULL_KILLS = 4, 60
CHUNKS = ("concepts/01-with-text", "concepts/02-unet-only")
KINDS: dict[str, tuple[str, ...]] = {
    "whole": (),
    "lora": ("lora={rank=4, alpha=2, base_weights='fp32', text_encoder={}}",),
}
"""By what is trained: settings of the run."""


def run(*, full: bool, data: Path | None) -> Result:
    """Measure; `data` is not used: pictures are the demo's."""
    figures: dict[str, float] = {}
    notes: list[str] = []
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            account, unproved = measure_kind(Path(folder), kind, num_kills=_FULL_KILLS if full else _KILLS, seed=0)
        own = {
            "kills": account.kills.total(),
            "of_these_sigterm": account.num_sigterm,
            **{f"while_{moment}": number for moment, number in sorted(account.kills.items())},
            "runs": account.num_runs,
            "wrong_lists": len(account.wrong_lists),
            "wrong_bits": len(account.wrong_bits),
            "sigterms_without_code_or_state": len(account.bad_exits),
            "runs_not_proved": len(unproved),
        }
        figures |= {f"{kind}_{name}": value for name, value in own.items()}
        notes.append(f"{kind}: an undisturbed launch over both stages takes {account.seconds:.1f} s")
        notes += [f"{kind}: {problem}" for problem in (*account.problems, *unproved)]
    zero = ("wrong_lists", "wrong_bits", "sigterms_without_code_or_state", "runs_not_proved")
    bars = [Bar(f"{kind}_{name}", at_most=0) for kind in KINDS for name in zero]
    return Result("kill_dreambooth", figures, bars, full_size=full, peer="the same runs, not disturbed", notes=notes)


def measure_kind(root: Path, kind: str, *, num_kills: int, seed: int) -> tuple[Account, list[str]]:
    """Disturb runs of a kind in `root`; return what happened, and what could not be proved of them."""
    overrides = (*TWO_STAGES, *KINDS[kind])
    first = make_run(root, make_sd(root / "model", "sd1"), *overrides, num_pictures=4)
    words = [word for override in overrides for word in ("--set", override)]
    if code := Launch(["pack-concepts", str(first.config), *words], first.log).wait():
        raise RuntimeError(f"pack-concepts ended with {code}:\n{first.log.read_text()[-4_000:]}")
    runs: list[TinyRun] = []

    def make(name: str, way: Way) -> TinyRun:
        runs.append(TinyRun(root / name, [*overrides, *way.overrides], config=first.config))
        return runs[-1]

    way = Way((1,), has_same_bits=True)
    account = measure_runs(make, CHUNKS, num_kills=num_kills, seed=seed, ways=(way,), undisturbed=way)
    return account, [f"{one.root.name}: {problem}" for one in runs for problem in _unproved(one)]


def _unproved(run: TinyRun) -> list[str]:
    proof = verify_run(load_config(run.root / "run.toml", RunConfig, []), run.root)
    lost = proof.planned - proof.trained
    return [*proof.problems, *([f"{lost} showings were not trained once"] if lost else [])]
