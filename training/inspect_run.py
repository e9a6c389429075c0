"""What a run is about to do (`plan`) and how far it is (`status`), as text and JSON. Reads only files; no torch."""

import json
from dataclasses import asdict
from pathlib import Path

from training.campaign import chunk_rows, image_rows, read_campaign, render_rows
from training.config import RunConfig
from training.ledger import totals
from training.plans import batch_plan
from training.run_dir import RunDir


def plan_text(config: RunConfig, root: Path | None, *, chunk_name: str | None) -> str:
    """Return buckets, steps and exposures of a chunk, and the steps of the whole run.

    Raises ChunkError for a chunk that is not in the run.
    """
    campaign = read_campaign(
        config.data.workspace, config.data.chunks, RunDir(root) if root is not None else None
    )  # fmt: skip
    name = chunk_name or campaign.next
    if name is None:
        return f"all {len(campaign.names)} chunks of {root} are done"
    index = campaign.chunk(name).read_index()
    epochs, num_steps = config.data.epochs, 0
    for chunk in campaign.chunks.values():
        num_steps += epochs * len(batch_plan(chunk.read_index(), chunk.name, config=config, epoch=0).steps)
    plan = batch_plan(index, name, config=config, epoch=0)
    return "\n".join(
        [
            plan.summary(),
            *(f"left out: {drop.key} {drop.reason} ({drop.detail})" for drop in plan.drops),
            f"the run: {len(campaign.chunks)} chunks, {epochs} epoch{'s' * (epochs > 1)} each, {num_steps:,} steps",
        ]
    )


def status_text(config: RunConfig, root: Path) -> str:
    """Return the status tables, the run's counters and what is next."""
    run_dir = RunDir(root)
    campaign = read_campaign(config.data.workspace, config.data.chunks, run_dir)
    sums, name = totals(campaign.lines), campaign.next
    if name is None:
        coming = "all chunks are done"
    elif (record := campaign.records.get(name)) is not None and record.last_state is not None:
        coming = f"next: {name}, half trained, from global step {record.last_state.global_step:,}"
    else:
        coming = f"next: {name}, not started"
    return "\n".join(
        [
            render_rows("chunks of", "chunks", chunk_rows(campaign.names, campaign.records)),
            "",
            render_rows("data set", "images", image_rows(campaign, run_dir)),
            "",
            f"global step {sums.global_step:,}  updates {sums.applied_updates:,}  images {sums.images_seen:,}  "
            f"skipped steps {sums.skipped_steps:,}  broken images {sums.broken_images:,}  "
            f"busy {sums.busy_seconds / 3600:.2f} h",
            coming,
        ]
    )


def status_json(config: RunConfig, root: Path) -> str:
    """Return the same as one JSON object."""
    run_dir = RunDir(root)
    campaign = read_campaign(config.data.workspace, config.data.chunks, run_dir)
    return json.dumps(
        {
            "chunks": [asdict(row) for row in chunk_rows(campaign.names, campaign.records)],
            "images": [asdict(row) for row in image_rows(campaign, run_dir)],
            "totals": asdict(totals(campaign.lines)),
            "next": campaign.next,
            "records": {name: asdict(record) for name, record in campaign.records.items()},
        },
        indent=2,
    )
