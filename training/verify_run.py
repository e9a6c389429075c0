"""`training status --verify`: prove from what a run wrote that each image was trained as often as planned.

Every chunk's batch plans are made anew from the run's copy of its index and laid beside the ledger, complete.json,
metrics.jsonl and the newest state; with trackers.trace beside trace.jsonl, too, which names every image of every step.
A step's images are its (key, concept, occurrence) in one epoch. Reads only. Runs while a launch is at work: what no
state holds yet is not looked at.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sharding.chunk import ChunkError
from training.chunk_history import histories
from training.chunk_records import imported_state
from training.config import RunConfig
from training.fork import settings_of
from training.ledger import Line
from training.metrics_file import read_metrics
from training.proof import Proof
from training.run_dir import RunDir
from training.set_aside import pending_rewind
from training.verify_chunk import Place, check_chunk


def verify_run(config: RunConfig, root: Path) -> Proof:
    """Compare everything. Raises LedgerError when the ledger itself is damaged; all else is in `problems`."""
    run_dir, proof = RunDir(root), Proof()
    lines = run_dir.read_ledger()
    places: dict[int, Place] = {}
    live = {name: one for name, one in histories(lines).items() if one.status != "superseded"}
    for name, history in live.items():
        proof.num_chunks += 1
        try:
            places |= check_chunk(name, history, partial(settings_of, lines, config, name), run_dir, proof)
        except (ChunkError, ValueError, OSError) as error:
            proof.problems.append(f"chunk {name}: {error}")
    saved = [line for history in live.values() for line in history.saved]
    newest = max(saved, key=lambda line: line["global_step"], default=None)
    reached = newest["global_step"] if newest is not None else 0
    imported = imported_state(lines)
    base = imported.global_step if imported is not None else 0
    for step in range(base + 1, reached + 1):
        if step not in places:
            proof.problems.append(f"global step {step:,}: in a saved state, but no chunk's plan has it")
            break
    proof.left += sum(place.step.num_images for step, place in places.items() if step > reached)
    _check_metrics(run_dir.metrics_path, places, base, reached, proof)
    _check_trace(run_dir.trace_path, places, reached, proof)
    _check_states(run_dir, lines, newest, proof)
    if pending_rewind(lines) is not None:
        proof.problems.append("a rewind was killed half-way: the next launch, or `--rewind` again, finishes it")
    proof.notes += [
        f"{line.fields['chunk']} and what came before it was trained in {line.fields['source']} (run "
        f"{line.fields['run_id']}), with the settings of that run"
        for line in lines
        if line.event == "forked"
    ]
    return proof


def _check_metrics(path: Path, places: Mapping[int, Place], base: int, reached: int, proof: Proof) -> None:
    """Require one row for each step that a state holds, in order, with what plan and ledger say of that step.

    base: the global step that the run began at.
    """
    images_seen, expected = 0, base + 1
    for row in read_metrics(path):
        step, place = row["global_step"], places.get(row["global_step"])
        if "step" not in row:
            continue  # measured before the first step; a row of a step that lost its own is missed below
        if step > reached:
            break
        where = (row["chunk"], row["epoch"], row["step"])
        if step != expected or place is None or where != (place.chunk, place.epoch, place.step.number):
            proof.problems.append(
                f"metrics.jsonl: a row of global step {step:,}, {where}, where step {expected:,} is due"
            )
            return
        images_seen += place.num_trained
        said = (row.get("train/images_seen"), row.get("train/skipped"), row.get("data/broken"))
        if said != (images_seen, int(place.is_skipped), len(place.broken)):
            proof.problems.append(
                f"metrics.jsonl, global step {step:,}: images seen, skipped, broken are {said}, by plan and ledger "
                f"{(images_seen, int(place.is_skipped), len(place.broken))}"
            )
            return
        expected += 1
    if expected <= reached:
        proof.problems.append(f"metrics.jsonl: ends before global step {expected:,}; states hold {reached:,}")


def _check_trace(path: Path, places: Mapping[int, Place], reached: int, proof: Proof) -> None:
    """Compare what was traced: buckets and keys as planned, each read image trained once, none at two times."""
    last = 0
    for row in read_metrics(path):
        step, place = row["global_step"], places.get(row["global_step"])
        if step > reached:
            break
        if step <= last or place is None:
            proof.problems.append(f"trace.jsonl: global step {step:,} stands there twice, or is no step of a plan")
            return
        last = step
        planned = [
            [one.bucket.width, one.bucket.height, [sample.key for sample in one.samples]]
            for one in place.step.micro_batches
        ]
        read = Counter(place.keys()) - Counter(place.broken)
        if row["planned"] != planned or (not place.is_skipped and Counter(s[0] for s in row["samples"]) != read):
            proof.problems.append(f"trace.jsonl, global step {step:,}: other images than planned")
            return
        proof.num_traced_steps += 1


def _check_states(run_dir: RunDir, lines: Sequence[Line], newest: Mapping[str, Any] | None, proof: Proof) -> None:
    """Compare the newest state with its line, and look for states that the ledger does not know."""
    from training.state_folder import load_state
    from training.state_manifest import StateError, read_manifest  # torch

    known = {line.fields["manifest_digest"] for line in lines if line.event in ("state_saved", "chunk_done")}
    reached, unknown, has_newest = newest["global_step"] if newest is not None else 0, [], newest is None
    for folder in run_dir.state_folders():
        try:
            manifest = read_manifest(folder)
            if newest is not None and manifest.digest == newest["manifest_digest"]:
                position = load_state(folder, is_verified=True).facts["position"]
                counts = (position["chunk"], position["chunk_images_trained"], position["chunk_applied_updates"])
                has_newest = counts == (newest["chunk"], newest["images_trained"], newest["applied_updates"])
        except StateError as error:
            proof.notes.append(f"a damaged state: {error}")
            continue
        if manifest.digest not in known and manifest.global_step > reached:
            unknown.append(folder)
    if not has_newest:
        path = newest["path"] if newest is not None else ""
        proof.problems.append(f"{path}: the newest state of the ledger is not there as it was saved")
    if len(unknown) > 1:
        proof.problems.append(f"{len(unknown)} states are newer than the ledger: lines were cut off its end")
    elif unknown:
        proof.notes.append(f"{unknown[0]}: not in the ledger yet, as after a kill; the next launch records it")
