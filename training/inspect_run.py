"""What a run is about to do (`plan`) and how far it is (`status`), as text and JSON. Reads only files; no torch."""

import json
from dataclasses import asdict
from pathlib import Path

from training.campaign import campaign_chunks, chunk_rows, image_rows, next_chunk, render_rows, require_in_campaign
from training.config import RunConfig
from training.ledger import chunk_records, totals
from training.plans import batch_plan
from training.run_dir import RunDir


def plan_text(config: RunConfig, root: Path | None, *, chunk_name: str | None) -> str:
    """Return buckets, steps and exposures of a chunk, and the steps of the whole run.

    Raises ChunkError for a chunk that is not in the run.
    """
    chunks = {chunk.name: chunk for chunk in campaign_chunks(config.data.workspace, config.data.chunks)}
    records = chunk_records(RunDir(root).read_ledger()) if root is not None else {}
    name = chunk_name or next_chunk(list(chunks), records)
    if name is None:
        return f"all {len(chunks)} chunks of {root} are done"
    require_in_campaign(name, list(chunks))
    epochs, num_steps = config.data.epochs, 0
    for chunk in chunks.values():
        num_steps += epochs * len(batch_plan(chunk.read_index(), chunk.name, config=config, epoch=0).steps)
    plan = batch_plan(chunks[name].read_index(), name, config=config, epoch=0)
    return "\n".join(
        [
            plan.summary(),
            *(f"left out: {drop.key} {drop.reason} ({drop.detail})" for drop in plan.drops),
            f"the run: {len(chunks)} chunks, {epochs} epoch{'s' * (epochs > 1)} each, {num_steps:,} steps in all",
        ]
    )


def status_text(config: RunConfig, root: Path) -> str:
    """Return the status tables, the run's counters and what is next."""
    chunks = campaign_chunks(config.data.workspace, config.data.chunks)
    lines = RunDir(root).read_ledger()
    records, sums = chunk_records(lines), totals(lines)
    name = next_chunk([chunk.name for chunk in chunks], records)
    if name is None:
        coming = "all chunks are done"
    elif (record := records.get(name)) is not None and record.last_state is not None:
        coming = f"next: {name}, half trained, from global step {record.last_state.global_step:,}"
    else:
        coming = f"next: {name}, not started"
    return "\n".join(
        [
            render_rows("chunks of", "chunks", chunk_rows([chunk.name for chunk in chunks], records)),
            "",
            render_rows("data set", "images", image_rows(chunks, records)),
            "",
            f"global step {sums.global_step:,}  updates {sums.applied_updates:,}  images {sums.images_seen:,}  "
            f"skipped steps {sums.skipped_steps:,}  broken images {sums.broken_images:,}  "
            f"busy {sums.busy_seconds / 3600:.2f} h",
            coming,
        ]
    )


def status_json(config: RunConfig, root: Path) -> str:
    """Return the same as one JSON object."""
    chunks = campaign_chunks(config.data.workspace, config.data.chunks)
    lines = RunDir(root).read_ledger()
    records = chunk_records(lines)
    names = [chunk.name for chunk in chunks]
    return json.dumps(
        {
            "chunks": [asdict(row) for row in chunk_rows(names, records)],
            "images": [asdict(row) for row in image_rows(chunks, records)],
            "totals": asdict(totals(lines)),
            "next": next_chunk(names, records),
            "records": {name: asdict(record) for name, record in records.items()},
        },
        indent=2,
    )
