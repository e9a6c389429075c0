"""What a run is about to do (`plan`), as text and JSON. Reads only files; no torch."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from sharding.chunk import Chunk
from training.campaign import read_campaign
from training.config import Prompt, RunConfig
from training.dreambooth.concept_prompts import read_concepts
from training.loading.remote import mirror_remote
from training.packages import missing_packages
from training.plan_checks import Finding, check_captions
from training.plan_report import PlanReport, plan_report
from training.plan_totals import run_totals
from training.plans import batch_plan, caption_settings, pixel_settings
from training.prompt_file import read_prompts
from training.run_dir import RunDir
from training.stages import epochs_of, require_packed, stage_config, unread_epochs


class PlanRefusedError(ValueError):
    """A run that cannot work, or would train something else than its settings say."""


def inspect_plan(
    config: RunConfig,
    root: Path | None,
    *,
    chunk_name: str | None,
    num_processes: int | None = None,
    with_state: bool = False,
) -> PlanReport | None:
    """Count what a chunk of the run is about to do, and the run as a whole; None when all chunks are done.

    root: the run's folder; None when there is none yet. chunk_name: default is the next one. with_state: how large a
    state is, too, which needs torch and takes seconds.
    Raises ChunkError for a chunk that is not in the run, ValueError for buckets that cannot be.
    """
    run_dir = RunDir(root) if root is not None else None
    mirror_remote(config.data, held_out=config.validation.chunk)
    campaign = read_campaign(config.data.workspace, config.data.chunks, run_dir, epochs=epochs_of(config))
    require_packed(config, campaign.names)
    name = chunk_name or campaign.next
    if name is None:
        return None

    def chunk_of(each: str) -> Chunk:
        started = run_dir.started_chunk(each, check_shards=False) if run_dir is not None else None
        return started or campaign.chunk(each)

    index, run = chunk_of(name).read_index(), config
    config = stage_config(run, name)
    plan = batch_plan(index, name, config=config, epoch=0)
    report = plan_report(
        plan,
        index,
        run_totals((chunk_of(each) for each in campaign.names), config=run),
        config=config,
        num_processes=num_processes,
        state=_state(config) if with_state else None,
        prompts=_prompts(config),
    )
    missing = [Finding("refused", str(need)) for need in missing_packages(config)]
    licences = [path for path in config.save.licence_files if not path.is_file()]
    missing += [Finding("refused", f"save.licence_files: {path}: no such file") for path in licences]
    read_concepts(config)  # raises for a file of concepts that is gone or wrong
    missing += [Finding("warning", problem) for problem in unread_epochs(run)]
    found = (*check_captions(index, config=config), *(_not_encoded(config, index, name) if with_state else ()))
    return replace(report, findings=(*missing, *report.findings, *found))


def plan_text(config: RunConfig, root: Path | None, *, chunk_name: str | None, with_state: bool = False) -> str:
    """Return the report as text. Raises PlanRefusedError, listing why, for a run that must not start."""
    report = inspect_plan(config, root, chunk_name=chunk_name, with_state=with_state)
    if report is None:
        return f"all chunks of {root} are done"
    if report.refusals:
        raise PlanRefusedError("\n".join(finding.text for finding in report.refusals))
    return report.text()


def _not_encoded(config: RunConfig, index: pa.Table, chunk: str) -> Iterator[Finding]:
    """Yield a warning when the chunk's latents or text outputs are to be read, and are not there yet."""
    if not (config.latents.use or config.latents.text):
        return
    from training.latents.ahead import ahead_of  # imports torch
    from training.latents.parts import LatentsError

    plans = [batch_plan(index, chunk, config=config, epoch=epoch) for epoch in range(config.data.epochs)]
    pixels, captions = pixel_settings(config), caption_settings(config)
    try:
        ahead_of(index, plans, config=config, pixels=pixels, captions=captions, from_main=lambda ask: ask())
    except (LatentsError, FileNotFoundError) as error:
        yield Finding("warning", str(error))


def _prompts(config: RunConfig) -> tuple[Prompt, ...]:
    file = config.preview.file
    return config.preview.prompts + (
        read_prompts(file, problems=config.recipe.prompt_problems) if file is not None else ()
    )


def _state(config: RunConfig) -> tuple[int, str]:
    from training.memory.report import state_bytes

    return state_bytes(config)
