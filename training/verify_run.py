"""`training status --verify`: prove from what a run wrote that each image was trained as often as planned.

Every chunk's batch plans are made anew from the run's copy of its index and laid beside the ledger, complete.json,
metrics.jsonl and the newest state; with trackers.trace beside trace.jsonl, too, which names every image of every step.
A step's images are its (key, concept, occurrence) in one epoch. Reads only. Runs while a launch is at work: what no
state holds yet is not looked at.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharding.chunk import ChunkError
from training.batch_plan import BatchPlan, Step
from training.chunk_history import History, histories
from training.chunk_records import imported_state
from training.config import RunConfig
from training.ledger import Line
from training.metrics_file import read_metrics
from training.plans import batch_plan
from training.proof import LostImage, Proof
from training.run_dir import RunDir

_SAME = ("path", "manifest_digest", "epoch", "step", "global_step", "images_trained", "applied_updates")


@dataclass(frozen=True)
class _Place:
    """A step of the run as planned, and what the ledger says became of it."""

    chunk: str
    epoch: int
    step: Step
    is_skipped: bool
    broken: Sequence[str]

    @property
    def num_trained(self) -> int:
        return 0 if self.is_skipped else self.step.num_images - len(self.broken)

    def keys(self) -> list[str]:
        return [sample.key for micro_batch in self.step.micro_batches for sample in micro_batch.samples]


def verify_run(config: RunConfig, root: Path) -> Proof:
    """Compare everything. Raises LedgerError when the ledger itself is damaged; all else is in `problems`."""
    run_dir, proof = RunDir(root), Proof()
    lines = run_dir.read_ledger()
    places: dict[int, _Place] = {}
    live = {name: one for name, one in histories(lines).items() if one.status != "superseded"}
    for name, history in live.items():
        proof.num_chunks += 1
        try:
            places |= _check_chunk(name, history, config, run_dir, proof)
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
    _check_trace(run_dir.root / "trace.jsonl", places, reached, proof)
    _check_states(run_dir, lines, newest, proof)
    return proof


# --- one chunk ---


def _check_chunk(name: str, history: History, config: RunConfig, run_dir: RunDir, proof: Proof) -> dict[int, _Place]:
    """Compare a chunk's plans with its lines; return its steps by global step, counted from 1."""
    chunk, latest = run_dir.started_chunk(name, check_shards=False), history.latest
    if chunk is None:
        raise ChunkError("the run's copy of its index is gone; restore it")
    problems: list[str] = []

    def compare(what: str, here: object, there: object) -> None:
        if here != there:
            problems.append(f"chunk {name}: {what}: the ledger says {here!r}, the plan {there!r}")

    compare("digest of the chunk", history.first["chunk_digest"], chunk.info.digest)
    index = chunk.read_index()
    plans = [batch_plan(index, name, config=config, epoch=epoch) for epoch in range(latest["epochs"])]
    digests = [plan.digest for plan in plans]
    for start in history.starts:
        told = start.get("plan_digests", [start["plan_digest"]])
        compare("digests of the batch plans", told, digests[: len(told)])
    compare("steps", latest["steps"], sum(len(plan.steps) for plan in plans))
    compare("images planned", latest["images_planned"], sum(plan.num_images for plan in plans))
    for plan in plans:
        _require_each_once(plan, index.num_rows, problems)

    places = dict(_places(name, history, plans))
    for event, by_step in (("skipped", history.skipped), ("broken", history.broken)):
        for global_step, fields in by_step.items():
            place = places.get(global_step)
            if place is None or (place.epoch, place.step.number) != (fields["epoch"], fields["step"]):
                problems.append(
                    f"chunk {name}: {event} at global step {global_step:,}, where its plan has another step"
                )
            elif Counter(fields["keys"]) - Counter(place.keys()) or (
                event == "skipped" and Counter(fields["keys"]) != Counter(place.keys())
            ):
                problems.append(f"chunk {name}: {event} at global step {global_step:,}: other keys than planned")
    for line in history.saved:
        before = [place for step, place in places.items() if step <= line["global_step"]]
        where = f"at global step {line['global_step']:,}"
        compare(f"images trained {where}", line["images_trained"], sum(place.num_trained for place in before))
        compare(f"updates {where}", line["applied_updates"], sum(not place.is_skipped for place in before))
        compare(f"steps done {where}", sum(len(p.steps) for p in plans[: line["epoch"]]) + line["step"], len(before))
    if history.status == "done":
        compare("steps of a chunk that is done", history.saved[-1]["global_step"], max(places, default=0))
        _compare_complete(name, history, digests, run_dir, problems)
    proof.problems += problems
    proof.planned += sum(plan.num_images for plan in plans)
    _count(history, places, proof)
    return places


def _require_each_once(plan: BatchPlan, num_rows: int, problems: list[str]) -> None:
    showings = [
        (sample.key, sample.concept, sample.occurrence)
        for micro_batch in plan.micro_batches()
        for sample in micro_batch.samples
    ]
    num_samples = len({showing[:2] for showing in showings}) + len(plan.drops)
    if len(set(showings)) != len(showings) or num_samples > num_rows:
        problems.append(f"chunk {plan.chunk} epoch {plan.epoch}: the plan shows an image more often than it may")


def _places(name: str, history: History, plans: Sequence[BatchPlan]) -> Iterator[tuple[int, _Place]]:
    """Yield the chunk's steps in order with their global steps, visit by visit."""
    ends = [visit.first_epoch for visit in history.visits[1:]] + [len(plans)]
    for visit, end in zip(history.visits, ends, strict=True):
        global_step = visit.global_step
        for plan in plans[visit.first_epoch : end]:
            for step in plan.steps:
                global_step += 1
                broken = history.broken.get(global_step, {}).get("keys", ())
                yield global_step, _Place(name, plan.epoch, step, global_step in history.skipped, broken)


def _compare_complete(name: str, history: History, digests: list[str], run_dir: RunDir, problems: list[str]) -> None:
    complete, last = run_dir.read_complete(name), history.saved[-1]
    if complete is None:
        problems.append(f"chunk {name}: done in the ledger, but complete.json is missing")
        return
    wrong = [key for key in _SAME if complete.get(key) != last[key]]
    wrong += ["plan_digests"] * (complete.get("plan_digests") != digests)
    wrong += ["chunk_digest"] * (complete.get("chunk_digest") != history.first["chunk_digest"])
    if wrong:
        problems.append(f"chunk {name}: complete.json has another {', '.join(wrong)} than the ledger")


def _count(history: History, places: Mapping[int, _Place], proof: Proof) -> None:
    reached = history.saved[-1]["global_step"] if history.saved else 0
    for global_step, place in places.items():
        if global_step > reached:
            continue
        proof.trained += place.num_trained
        reasons = dict(zip(place.broken, history.broken.get(global_step, {}).get("reasons", ()), strict=False))
        for key in place.broken:
            proof.broken.append(LostImage(place.chunk, place.epoch, global_step, key, reasons.get(key, "")))
        if place.is_skipped:
            keys = (Counter(place.keys()) - Counter(place.broken)).elements()
            reason = history.skipped[global_step]["reason"]
            proof.skipped += [LostImage(place.chunk, place.epoch, global_step, key, reason) for key in keys]


# --- the run ---


def _check_metrics(path: Path, places: Mapping[int, _Place], base: int, reached: int, proof: Proof) -> None:
    """Require one row for each step that a state holds, in order, with what plan and ledger say of that step.

    base: the global step that the run began at.
    """
    images_seen, expected = 0, base + 1
    for row in read_metrics(path):
        step, place = row["global_step"], places.get(row["global_step"])
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


def _check_trace(path: Path, places: Mapping[int, _Place], reached: int, proof: Proof) -> None:
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
