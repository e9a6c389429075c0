"""verdict.json: what was last said of each concept, with its reasons, and how it is told in words. No torch."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sharding.files import write_json
from training.dreambooth.verdict.remedies import Remedy
from training.dreambooth.verdict.rule import Reading

FILE = "verdict.json"


@dataclass(frozen=True)
class Nearest:
    """The training picture that a preview is most like."""

    key: str
    likeness: float


@dataclass(frozen=True)
class Preview:
    """A preview of a concept, and of every concept the training picture that it is most like."""

    file: str
    """Below the run folder."""
    concept: str
    nearest: Mapping[str, Nearest]


@dataclass(frozen=True)
class Verdict:
    """See the module. best: the folder of the best state below the run folder, and its step; None without one."""

    chunk: str
    global_step: int
    readings: Mapping[str, Reading]
    remedies: Mapping[str, Sequence[Remedy]]
    previews: Sequence[Preview]
    drift: float | None
    drift_since: int | None
    """The step whose sanity picture the drift is measured from."""
    best: tuple[str, int] | None

    def write(self, run_folder: Path) -> None:
        """Write verdict.json."""
        concepts = {
            name: {**asdict(reading), "remedies": [asdict(one) for one in self.remedies.get(name, ())]}
            for name, reading in self.readings.items()
        }
        write_json(
            run_folder / FILE,
            {
                "chunk": self.chunk, "global_step": self.global_step, "concepts": concepts,
                "previews": [asdict(one) for one in self.previews],
                "bleed": bleed(self.previews),
                "sanity": {"drift": self.drift, "since_global_step": self.drift_since},
                "best": None if self.best is None else {"state": self.best[0], "global_step": self.best[1]},
            },
        )  # fmt: skip


def bleed(previews: Sequence[Preview]) -> dict[str, dict[str, float]]:
    """Return of each concept's previews how like they are to the pictures of each concept: the most of any of them."""
    matrix: dict[str, dict[str, float]] = {}
    for preview in previews:
        row = matrix.setdefault(preview.concept, {})
        for name, nearest in preview.nearest.items():
            row[name] = max(row.get(name, 0.0), nearest.likeness)
    return matrix


def read_verdict(run_folder: Path) -> dict[str, Any] | None:
    """Return what verdict.json holds; None when nothing was said yet. Raises ValueError when it is damaged."""
    path = run_folder / FILE
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); remove it: the next verdict writes it anew") from error
    return value


def verdict_lines(verdict: Mapping[str, Any], *, brief: bool = False) -> Iterator[str]:
    """Yield the words of a verdict.json, as `status` and the log have them. brief: without what to do about it."""
    yield f"verdict at global step {verdict['global_step']:,} ({verdict['chunk']}):"
    for name, reading in verdict["concepts"].items():
        yield f"  {name}: {reading['word']}: {'; '.join(reading['reasons'])}"
        if not brief:
            yield from (f"    not known: {one}" for one in reading["unknown"])
            yield from (f"    try: {Remedy(**one)}" for one in reading["remedies"])
    if verdict["best"] is not None:
        best = verdict["best"]
        yield f"  best state: {best['state']} (global step {best['global_step']:,}); kept, `export --best` writes it"
    if not brief:
        yield from _bleed_lines(verdict["bleed"])


def _bleed_lines(matrix: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    names = sorted({name for row in matrix.values() for name in row})
    if len(names) < 2 or len(matrix) < 2:
        return
    wide = max(map(len, names))
    yield "  likeness of previews (rows) and training pictures (columns):"
    yield f"    {'':{wide}}  " + "  ".join(f"{name:>{max(wide, 4)}}" for name in names)
    for own in sorted(matrix):
        cells = (f"{matrix[own][name]:.2f}" if name in matrix[own] else "" for name in names)
        yield f"    {own:{wide}}  " + "  ".join(f"{cell:>{max(wide, 4)}}" for cell in cells)
