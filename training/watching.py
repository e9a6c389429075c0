"""What people look at while a chunk is trained: previews, the loss of held-out pictures, the verdict; when each is due.

The first two are due at steps by the config, and at the end of a chunk. The verdict (of concepts, or a sanity prompt)
comes with either, and at the start of each chunk, for what later ones are compared with. What was due in a step whose
launch was stopped or killed is made by the next one, before it goes on; what is there already is not made again.
"""

from collections.abc import Iterator
from typing import Literal

from training.config import Prompt
from training.config.watching import PreviewConfig, ValidationConfig
from training.dreambooth.verdict.prompts import sanity_prompt
from training.dreambooth.verdict.watch import VerdictWatch
from training.position import Position
from training.preview import is_drawn, write_pictures
from training.preview_prompts import preview_prompts
from training.rank import Rank
from training.trained import Trained
from training.validation import Validation


class Watching:
    """Of one chunk, on every rank. Made before networks are loaded. Raises as `preview_prompts` and `Validation`."""

    def __init__(self, rank: Rank, chunk: str) -> None:
        self._rank = rank
        self.prompts: tuple[Prompt, ...] = rank.from_main(
            lambda: preview_prompts(rank.config, rank.run_dir, chunk=chunk)
        )
        self._validation = Validation(rank)
        self._verdict: VerdictWatch | None = None
        recipe = rank.config.dreambooth
        if recipe is not None and (recipe.concepts is not None or recipe.sanity_prompt):
            sanity = sanity_prompt(rank.config, self.prompts)
            self._verdict = VerdictWatch(rank, chunk, previews=self.prompts, sanity=sanity)
            self.prompts += (sanity,) if sanity is not None else ()

    def begin(self, trained: Trained, position: Position) -> str:
        """Make what later verdicts are compared with, before the chunk's first update: with that of the run's first
        chunk, previews, too. Return as `make`; every rank has to call it.
        """
        if self._verdict is None:
            return ""
        is_drawn = position.global_step == 0 and bool(self.prompts)
        return (is_drawn and self._preview(trained, position)) or self._verdict.run(trained, position)

    def make(self, trained: Trained, position: Position, *, at_end: bool = False) -> str:
        """Make what is due at `position` and not there; return why the ranks agreed to stop meanwhile, or "".

        at_end: the chunk ends there. Every rank has to call it.
        """
        for what in self._due(position, at_end=at_end):
            if what == "preview":
                reason = self._preview(trained, position)
            elif what == "validation":
                reason = self._validation.run(trained, position)
            else:
                assert self._verdict is not None
                reason = self._verdict.run(trained, position, at_end=at_end)
            if reason:
                return reason
        return ""

    def is_complete(self, position: Position, *, at_end: bool = False) -> bool:
        """Tell whether everything that is due at `position` is there; rank 0 only."""
        assert self._rank.records is not None
        is_there = {"preview": self._is_drawn(position), "validation": self._rank.records.is_validated(position)}
        if self._verdict is not None:
            is_there["verdict"] = self._verdict.is_there(position)
        return all(is_there[what] for what in self._due(position, at_end=at_end))

    def _due(self, position: Position, *, at_end: bool) -> Iterator[Literal["preview", "validation", "verdict"]]:
        config = self._rank.config
        is_preview, is_validation = (
            _is_due(settings, position, at_end=at_end) for settings in (config.preview, config.validation)
        )
        if self.prompts and is_preview:
            yield "preview"
        if config.validation.chunk is not None and is_validation:
            yield "validation"
        if self._verdict is not None and (is_preview or is_validation):
            yield "verdict"

    def _preview(self, trained: Trained, position: Position) -> str:
        """Draw on every rank, in eval mode and the run's compute format; rank 0 writes when all pictures are made."""
        rank = self._rank
        if rank.from_main(lambda: self._is_drawn(position)):
            return ""
        pictures = []
        with trained.shown():
            for prompt in self.prompts:
                if reason := rank.agreed_stop():
                    return reason
                with rank.engine.autocast():
                    pictures += trained.recipe.preview([prompt])
        if rank.is_main:
            folder = rank.run_dir.previews_folder(position.chunk)
            write_pictures(folder, position.global_step, pictures, self.prompts)
        rank.engine.barrier()
        return ""

    def _is_drawn(self, position: Position) -> bool:
        return is_drawn(self._rank.run_dir.previews_folder(position.chunk), position.global_step)


def _is_due(settings: PreviewConfig | ValidationConfig, position: Position, *, at_end: bool) -> bool:
    every = settings.every_steps
    return (at_end and settings.at_chunk_end) or (every > 0 and position.global_step % every == 0)
