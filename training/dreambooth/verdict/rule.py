"""From a concept's curves to a word: under, good, over, or unknown; with the reasons, and with what is not known.

    over    a held-out loss that has risen from its minimum while the trained one fell; a gap between the two that has
            grown while the held-out one no longer falls; a preview that repeats a training picture, where those of the
            start did not; a sanity picture that has become another one, unless the held-out loss still falls
    under   no such sign, and: a trained loss that has hardly fallen; or a held-out loss that still falls, and where
            none is held out, a trained one that does
    good    neither

Limits are those of `verdict.toml`. What this cannot tell: whether pictures look good; whether a loss that falls no more
does so because the rate has become small; and anything about a subject's likeness, since pixels are compared.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from training.dreambooth.verdict.curves import ConceptCurves, Curve, Curves
from training.dreambooth.verdict.limits import Rule

Word = Literal["under", "good", "over", "unknown"]


@dataclass(frozen=True)
class Reading:
    """What is said of a concept. unknown: what could not be looked at."""

    word: Word
    reasons: tuple[str, ...]
    unknown: tuple[str, ...] = ()


def judge(curves: Curves, rule: Rule) -> dict[str, Reading]:
    """Return the reading of every concept."""
    return {name: judge_concept(concept, curves.drift, rule) for name, concept in curves.concepts.items()}


def judge_concept(concept: ConceptCurves, drift: Curve, rule: Rule) -> Reading:
    """Return the reading of one concept. drift: of the sanity picture, the same for all."""
    unknown = tuple(_unknown(concept, drift))
    longest = max(len(concept.trained.points), len(concept.held_out.points))
    if longest < rule.min_points:
        often = "preview.every_steps and validation.every_steps say how often it is measured"
        return Reading("unknown", (f"{longest} of {rule.min_points} measurements are there; {often}",), unknown)
    if over := tuple(_signs_of_over(concept, drift, rule)):
        return Reading("over", over, unknown)
    if under := tuple(_signs_of_under(concept, rule)):
        return Reading("under", under, unknown)
    return Reading("good", tuple(_signs_of_good(concept, rule)), unknown)


def _signs_of_over(concept: ConceptCurves, drift: Curve, rule: Rule) -> Iterator[str]:
    trained, held_out, nearest = concept.trained, concept.held_out, concept.nearest
    is_held_out_falling = _is_known(held_out, rule) and held_out.fallen(since_share=rule.recent) > rule.still_falling
    if _is_known(held_out, rule) and trained:
        step, rise = held_out.lowest[0], held_out.risen()
        if rise > rule.held_out_rise and trained.last < trained.at(step):
            yield (
                f"the held-out loss has risen by {rise:.1%} since its minimum at step {step:,}, while the trained one "
                f"went on falling ({trained.at(step):.4f} → {trained.last:.4f})"
            )
        growth = ((held_out.last - trained.last) - (held_out.first - trained.first)) / held_out.first
        if growth > rule.gap_growth and not is_held_out_falling:
            yield f"held-out and trained loss are {growth:.1%} farther apart, and the held-out one no longer falls"
    if nearest and nearest.last > rule.nearest and not (len(nearest.points) > 1 and nearest.first > rule.nearest):
        yield f"a preview repeats a training picture (likeness {nearest.last:.2f}, limit {rule.nearest:g})"
    if drift and drift.last > rule.drift and not is_held_out_falling:
        yield (
            f"the sanity picture, which has nothing of the concepts, has become another one (drift {drift.last:.2f}, "
            f"limit {rule.drift:g})"
        )


def _signs_of_under(concept: ConceptCurves, rule: Rule) -> Iterator[str]:
    if _is_known(concept.trained, rule) and concept.trained.fallen() < rule.min_learned:
        yield f"the trained loss has hardly moved ({-concept.trained.fallen():+.1%} since the start)"
    name, curve = ("held-out", concept.held_out) if _is_known(concept.held_out, rule) else ("trained", concept.trained)
    recent = curve.fallen(since_share=rule.recent) if curve else 0.0
    if recent > rule.still_falling:
        yield f"the {name} loss is still falling (by {recent:.1%} in the last third of the steps)"


def _signs_of_good(concept: ConceptCurves, rule: Rule) -> Iterator[str]:
    if _is_known(concept.trained, rule):
        yield f"the trained loss has fallen by {concept.trained.fallen():.1%}"
    if _is_known(concept.held_out, rule):
        step, lowest = concept.held_out.lowest
        yield f"the held-out loss neither falls nor rises (minimum {lowest:.4f} at step {step:,})"


def _unknown(concept: ConceptCurves, drift: Curve) -> Iterator[str]:
    if not concept.trained:
        yield "whether the concept's own pictures are learned: none of them was measured"
    if not concept.held_out:
        yield (
            "whether it is learned or memorised: no picture of the concept is held out (chunk concepts/held-out), so a "
            "falling loss alone looks the same in both cases"
        )
    if not concept.nearest:
        yield "whether it repeats training pictures: no preview shows the concept"
    if not drift:
        yield "whether other pictures suffer: dreambooth.sanity_prompt is not set, or no preview was made"


def _is_known(curve: Curve, rule: Rule) -> bool:
    return len(curve.points) >= rule.min_points


def score(curves: Curves, step: int) -> float | None:
    """Return the mean held-out loss of the concepts at a step, each as a share of its first; None without any."""
    values = [
        concept.held_out.at(step) / concept.held_out.first
        for concept in curves.concepts.values()
        if concept.held_out and concept.held_out.points[0][0] <= step
    ]
    return sum(values) / len(values) if values else None


def best_step(curves: Curves, rule: Rule, *, candidates: Mapping[int, object] | set[int]) -> int | None:
    """Return the step whose state is the best of the candidates; None when there is none.

    Where pictures are held out it has the lowest `score`, of equal ones the last; else it is the last at which the
    fewest concepts read over.
    """
    steps = [step for step in curves.steps if step in candidates]
    scores = {step: value for step in steps if (value := score(curves, step)) is not None}
    if scores:
        return min(reversed(list(scores)), key=scores.__getitem__)
    words = {step: [one.word for one in judge(curves.up_to(step), rule).values()] for step in steps}
    return min(reversed(steps), key=lambda step: words[step].count("over")) if steps else None
