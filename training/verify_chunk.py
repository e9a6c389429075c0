"""`training status --verify`, one chunk: its batch plans, made anew, beside what ledger and complete.json say of it."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sharding.chunk import ChunkError
from training.batch_plan import BatchPlan, Step
from training.chunk_history import History
from training.config import RunConfig
from training.plans import batch_plan
from training.proof import LostImage, Proof
from training.run_dir import RunDir

_SAME = ("path", "manifest_digest", "epoch", "step", "global_step", "images_trained", "applied_updates")


@dataclass(frozen=True)
class Place:
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


def check_chunk(
    name: str, history: History, config_of: Callable[[int], RunConfig], run_dir: RunDir, proof: Proof
) -> dict[int, Place]:
    """Compare a chunk's plans with its lines; return its steps by global step, counted from 1.

    config_of: the settings by epoch.
    """
    chunk, latest = run_dir.started_chunk(name, check_shards=False), history.latest
    if chunk is None:
        raise ChunkError("the run's copy of its index is gone; restore it")
    problems: list[str] = []

    def compare(what: str, here: object, there: object) -> None:
        if here != there:
            problems.append(f"chunk {name}: {what}: the ledger says {here!r}, the plan {there!r}")

    compare("digest of the chunk", history.first["chunk_digest"], chunk.info.digest)
    index = chunk.read_index()
    plans = [batch_plan(index, name, config=config_of(epoch), epoch=epoch) for epoch in range(latest["epochs"])]
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


def _places(name: str, history: History, plans: Sequence[BatchPlan]) -> Iterator[tuple[int, Place]]:
    """Yield the chunk's steps in order with their global steps, visit by visit."""
    ends = [visit.first_epoch for visit in history.visits[1:]] + [len(plans)]
    for visit, end in zip(history.visits, ends, strict=True):
        global_step = visit.global_step
        for plan in plans[visit.first_epoch : end]:
            for step in plan.steps:
                global_step += 1
                broken = history.broken.get(global_step, {}).get("keys", ())
                yield global_step, Place(name, plan.epoch, step, global_step in history.skipped, broken)


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


def _count(history: History, places: Mapping[int, Place], proof: Proof) -> None:
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
