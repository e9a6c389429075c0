"""The verdict during a run: measured where validation or previews are due, at the start of every chunk, and at its end.

    losses      all ranks: fixed-noise losses of trained and held-out pictures, per concept
    pictures    rank 0: previews of this step against training pictures, the sanity picture against the first one
    words       rank 0: a row of metrics.jsonl, verdict.json, log lines, the mark of the best state

What is said is a function of metrics.jsonl and of the pictures, so a resumed run says the same.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from sharding.chunk import ChunkError
from sharding.config import load_config
from sharding.files import digest_of, open_replacing
from training.chunk_data import ChunkSource
from training.config import Prompt, RunConfig
from training.dreambooth.verdict.best import epochs_until, keep_best, saved_states
from training.dreambooth.verdict.curves import DRIFT, NEAREST, TRAINED, read_curves
from training.dreambooth.verdict.likeness import drift
from training.dreambooth.verdict.limits import builtin_limits
from training.dreambooth.verdict.losses import VerdictLosses
from training.dreambooth.verdict.nearest import References
from training.dreambooth.verdict.prompts import shown_concepts
from training.dreambooth.verdict.remedies import remedies
from training.dreambooth.verdict.report import Preview, Verdict, read_verdict, verdict_lines
from training.dreambooth.verdict.rule import best_step, judge
from training.dreambooth.verdict.selection import CLASS_SUFFIX, group_of
from training.metrics_file import read_metrics
from training.position import Position
from training.preview import read_pictures
from training.rank import Rank
from training.trained import Trained

logger = logging.getLogger(__name__)

FOLDER = "verdict"
"""Of the run folder: holds the sanity picture that later ones are compared with."""


@dataclass
class _Looks:
    """What pictures say. values: for the charts."""

    values: dict[str, float] = field(default_factory=dict)
    previews: list[Preview] = field(default_factory=list)
    since_step: int | None = None


class VerdictWatch:
    """See the module. Of one chunk, on every rank; made before networks are loaded. Raises as `VerdictLosses`.

    previews: as `preview_prompts` gives them. sanity: drawn as the last preview after these.
    """

    def __init__(self, rank: Rank, chunk: str, *, previews: Sequence[Prompt], sanity: Prompt | None) -> None:
        self._rank, self._sanity, self._num_previews = rank, sanity, len(previews)
        started = rank.run_dir.started_chunk(chunk, check_shards=False)
        assert started is not None  # it was copied just now
        self._limits = builtin_limits()
        self._losses = VerdictLosses(rank, started, self._limits.measure)
        self._references = References(
            ChunkSource.of_chunk(started), most=self._limits.measure.reference_pictures, seed=rank.config.seed
        )
        self._has_class_images = any(name.endswith(CLASS_SUFFIX) for name in group_of(started.read_index()))
        self._shown = rank.from_main(lambda: shown_concepts(previews, self._losses.names, rank.config))

    def is_there(self, position: Position) -> bool:
        """Tell whether this step's row is in metrics.jsonl; for rank 0."""
        wanted = {TRAINED + name for name in self._losses.names}
        return any(
            row["global_step"] == position.global_step and not wanted.isdisjoint(row)
            for row in read_metrics(self._rank.run_dir.metrics_path)
        )

    def run(self, trained: Trained, position: Position, *, at_end: bool = False) -> str:
        """Measure, record and tell; return why the ranks agreed to stop meanwhile, or "". Every rank has to call it."""
        rank = self._rank
        row: dict[str, float] = {}
        if not rank.from_main(lambda: self.is_there(position)):
            row, reason = self._losses.run(trained)
            if reason:
                return reason
        rank.from_main(lambda: self._conclude(position, row, at_end=at_end))
        return ""

    def _conclude(self, position: Position, row: Mapping[str, float], *, at_end: bool) -> None:
        """Record losses that were just measured, and say what they mean; for rank 0."""
        assert self._rank.records is not None
        looks = self._look(position)
        if row:
            self._rank.records.measured(position, {**row, **looks.values})
        told = read_verdict(self._rank.run_dir.root)
        if row or told is None or told["global_step"] != position.global_step:
            self._tell(position, looks, before=told, at_end=at_end)

    # --- pictures ---

    def _look(self, position: Position) -> _Looks:
        """Compare the previews of this step, if there are any."""
        looks, run_dir = _Looks(), self._rank.run_dir
        drawn = read_pictures(run_dir.previews_folder(position.chunk)).get(position.global_step, {})
        for number, concept in enumerate(self._shown):
            path = drawn.get(f"preview/{number:02d}")
            if path is not None and concept is not None:
                looks.previews += self._compared(path, concept)
        path = drawn.get(f"preview/{self._num_previews:02d}")
        if path is not None and self._sanity is not None:
            looks.values[DRIFT], looks.since_step = self._drift(path, self._sanity, position)
        for preview in looks.previews:
            if preview.concept in preview.nearest:
                chart = NEAREST + preview.concept
                looks.values[chart] = max(looks.values.get(chart, 0.0), preview.nearest[preview.concept].likeness)
        return looks

    def _compared(self, path: Path, concept: str) -> list[Preview]:
        try:
            with Image.open(path) as picture:
                nearest = self._references.nearest(picture.convert("RGB"))
        except ChunkError as error:
            if not self._rank.config.latents.use:  # else the pictures themselves need not be there
                raise
            logger.warning("previews are not compared with training pictures: %s", error)
            return []
        return [Preview(self._rank.run_dir.relative(path), concept, nearest)]

    def _drift(self, path: Path, prompt: Prompt, position: Position) -> tuple[float, int]:
        """Return the distance from the first picture of this prompt, and the step of that; the first one is kept."""
        name = digest_of(prompt.model_dump(mode="json"))[:8]
        folder = self._rank.run_dir.root / FOLDER
        base = next(iter(sorted(folder.glob(f"sanity-{name}-step-*.png"))), None)
        if base is None:
            folder.mkdir(exist_ok=True)
            base = folder / f"sanity-{name}-step-{position.global_step:08d}.png"
            with open_replacing(base) as stream:
                stream.write(path.read_bytes())
        with Image.open(path) as picture, Image.open(base) as first:
            return round(drift(picture, first), 4), int(base.stem.rpartition("-")[2])

    # --- words ---

    def _tell(self, position: Position, looks: _Looks, *, before: Mapping[str, Any] | None, at_end: bool) -> None:
        run_dir, rule = self._rank.run_dir, self._limits.rule
        curves = read_curves(read_metrics(run_dir.metrics_path))
        readings = judge(curves, rule)
        states = saved_states(run_dir) | self._coming_state(position, at_end=at_end)
        step = best_step(curves, rule, candidates=states)
        if step is not None:
            keep_best(run_dir, states[step])
        config = self._run_config()
        epochs = epochs_until(self._rank.ledger.lines, step) if step is not None else None
        Verdict(
            position.chunk,
            position.global_step,
            readings,
            {
                name: remedies(reading.word, config=config, best_epochs=epochs, has_class_images=self._has_class_images)
                for name, reading in readings.items()
            },
            looks.previews,
            looks.values.get(DRIFT),
            looks.since_step,
            None if step is None else (run_dir.relative(states[step]), step),
        ).write(run_dir.root)
        told = read_verdict(run_dir.root)
        assert told is not None
        is_news = at_end or before is None or _words(before) != _words(told)
        for line in verdict_lines(told, brief=not is_news):
            logger.info("%s", line)

    def _coming_state(self, position: Position, *, at_end: bool) -> dict[int, Path]:
        """Return the state of this step where the run saves one: it may still be on its way to the disk."""
        run_dir, step = self._rank.run_dir, position.global_step
        if at_end:
            return {step: run_dir.final_folder(position.chunk)}
        is_due = step > 0 and position.step > 0 and step % self._rank.config.save.every_steps == 0
        return {step: run_dir.state_folder(position.chunk, step)} if is_due else {}

    def _run_config(self) -> RunConfig:
        """Return the settings of the run, which those of a stage were made from."""
        path = self._rank.run_dir.config_path
        return load_config(path, RunConfig) if path.exists() else self._rank.config


def _words(verdict: Mapping[str, Any]) -> dict[str, str]:
    return {name: reading["word"] for name, reading in verdict["concepts"].items()}
