"""What is trained and what remains: chunks by data set as the seed's card has them, images, concepts.

"training done" of the seed's table is the number of the last chunk that is trained, and chunks start from 0; where some
in between are not trained, all that are have their numbers there. The counts are the ledger's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow.compute as pc

from training.campaign import Campaign
from training.card.tables import TOTAL, dotted, in_order, padded, table
from training.run_dir import RunDir
from training.stages import CONCEPTS
from training.status_tables import ChunkCounts, StatusRow


@dataclass(frozen=True)
class SetStatus:
    """The chunks of one data set. done: which are trained, for people."""

    name: str
    done: str
    num_done: int
    num_remaining: int


def chunk_status(campaign: Campaign, *, order: Sequence[str] = ()) -> list[SetStatus]:
    """Return the chunks done and remaining by the folder that they are in."""
    folders = in_order([name.rpartition("/")[0] for name in campaign.names], order)
    found = []
    for folder in folders:
        names = sorted(name for name in campaign.names if name.rpartition("/")[0] == folder)
        is_done = [campaign.is_done(name) for name in names]
        labels = [_label(name) for name in names]
        found.append(SetStatus(folder, _spans(labels, is_done), sum(is_done), len(names) - sum(is_done)))
    return found


def _label(name: str) -> str:
    last = name.rpartition("/")[2]
    return f"{int(last):03d}" if last.isdigit() else last


def _spans(labels: Sequence[str], is_done: Sequence[bool]) -> str:
    """Return `003` when the first ones are done and no other, else each run of done ones: `000-001, 004`."""
    runs: list[list[str]] = []
    for number, (label, done) in enumerate(zip(labels, is_done, strict=True)):
        if not done:
            continue
        if number and is_done[number - 1]:
            runs[-1].append(label)
        else:
            runs.append([label])
    if not runs:
        return "-"
    if len(runs) == 1 and is_done[0]:
        return runs[0][-1]
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def chunk_table(sets: Sequence[SetStatus]) -> list[str]:
    """Return the seed's status table; its sums are numbers of chunks."""
    done, remaining = sum(one.num_done for one in sets), sum(one.num_remaining for one in sets)
    rows = [(one.name, one.done, padded(one.num_remaining, done + remaining)) for one in sets]
    return table(("dataset name", "training done", "remaining"), [*rows, (TOTAL, str(done), str(remaining))])


def image_table(rows: Sequence[StatusRow], *, order: Sequence[str]) -> list[str]:
    """Return the same in images, by the data set that each comes from, however chunks are mixed."""
    by_name = {row.name: row for row in rows}
    names = in_order(list(by_name), order)
    sums = StatusRow(TOTAL, sum(row.done for row in rows), sum(row.remaining for row in rows))
    return table(
        ("dataset name", "images trained", "images remaining", "total images"),
        [
            (row.name, *map(dotted, (row.done, row.remaining, row.total)))
            for row in [*map(by_name.get, names), sums]
            if row
        ],
    )


# --- concepts ---


def has_concepts(campaign: Campaign) -> bool:
    """Tell whether the run trains packed concepts."""
    return any(name.startswith(f"{CONCEPTS}/") for name in campaign.names)


def concept_table(campaign: Campaign, run_dir: RunDir) -> list[str]:
    """Return the pictures of each concept, with those of its class. Raises ChunkError for a chunk that is gone."""
    instances: dict[str, set[str]] = {}
    classes: dict[str, set[str]] = {}
    for name in campaign.names:
        chunk = run_dir.started_chunk(name, check_shards=False) or campaign.chunk(name)
        index = chunk.read_index()
        concepts = index.column("concept" if "concept" in index.column_names else "dataset")
        for concept in pc.unique(concepts).to_pylist():
            base, slash, _ = concept.rpartition("/class")
            into = classes if slash else instances
            keys = index.filter(pc.equal(concepts, concept)).column("key").to_pylist()
            into.setdefault(base if slash else concept, set()).update(keys)
    names = list(dict.fromkeys([*instances, *classes]))
    rows = [(name, dotted(len(instances.get(name, ()))), dotted(len(classes.get(name, ())))) for name in names]
    sums = [dotted(sum(map(len, groups.values()))) for groups in (instances, classes)]
    return table(("concept", "images", "class images"), [*rows, (TOTAL, *sums)])


def stage_table(campaign: Campaign, counts: Mapping[str, ChunkCounts]) -> list[str]:
    """Return the images shown in each stage, repeats and epochs counted; those trained are the ledger's."""
    rows = []
    for name in campaign.names:
        record = campaign.records.get(name)
        is_live = record is not None and record.status != "superseded"
        epochs = campaign.epochs(name)
        done = record.images_trained if record is not None and is_live else 0
        planned = counts[name].showings * epochs
        if record is not None and is_live:
            planned = record.images_planned * epochs // record.epochs
        missing = 0 if campaign.is_done(name) else max(planned - done, 0)
        rows.append(StatusRow(name.removeprefix(f"{CONCEPTS}/"), done, missing))
    sums = StatusRow(TOTAL, sum(row.done for row in rows), sum(row.remaining for row in rows))
    cells = [(row.name, *map(dotted, (row.done, row.remaining, row.total))) for row in [*rows, sums]]
    return table(("stage", "training done", "remaining", "total"), cells)
