"""Learning-rate schedules as pure functions of the global step. No torch.

The shapes and parameters are those of diffusers' `get_scheduler`, with one difference: warm-up. There step 0 has rate
0, so that the first batch is wasted; here it has 1 / warmup_steps, and step warmup_steps - 1 the peak. From there on
values are equal, step by step.
"""

import math
from functools import cache

NEEDS_HORIZON = frozenset({"linear", "cosine", "cosine_with_restarts", "polynomial"})
HAS_WARMUP = NEEDS_HORIZON | {"constant_with_warmup"}


def rate_factor(
    name: str,
    *,
    global_step: int,
    warmup_steps: int,
    total_steps: int | None,
    end_fraction: float = 0.0,
    restarts: int = 1,
    power: float = 1.0,
    rules: str = "",
) -> float:
    """Return the share of the peak learning rate at a global step, counted from 0 over the whole run.

    Shapes that need a horizon fall from 1 behind the warm-up to end_fraction at total_steps, and stay there.
    Raises ValueError for an unknown name, a missing horizon or rules that cannot be read.
    """
    if name in HAS_WARMUP and global_step < warmup_steps:
        return (global_step + 1) / warmup_steps
    if name in ("constant", "constant_with_warmup"):
        return 1.0
    if name == "piecewise_constant":
        steps, last = parse_rules(rules)
        return next((factor for factor, end in steps if global_step < end), last)
    if name not in NEEDS_HORIZON:
        raise ValueError(f"schedule.name: {name!r} is not one of {', '.join(sorted(HAS_WARMUP))}, constant, …")
    if total_steps is None:
        raise ValueError(f"schedule {name!r} needs total_steps")
    progress = min(1.0, (global_step - warmup_steps) / (total_steps - warmup_steps))
    return end_fraction + (1.0 - end_fraction) * _fall(name, progress, restarts=restarts, power=power)


def _fall(name: str, progress: float, *, restarts: int, power: float) -> float:
    """Return the shape, from 1 at progress 0 to 0 at progress 1."""
    if progress >= 1.0:
        return 0.0
    if name == "linear":
        return 1.0 - progress
    if name == "polynomial":
        return float((1.0 - progress) ** power)
    if name == "cosine_with_restarts":
        progress = (restarts * progress) % 1.0
    return 0.5 * (1.0 + math.cos(math.pi * progress))


@cache
def parse_rules(rules: str) -> tuple[tuple[tuple[float, int], ...], float]:
    """Return ((factor, up to this step), …) and the factor behind the last of them. Raises ValueError.

    rules: "1:10,0.1:20,0.005", as diffusers' step_rules.
    """
    *firsts, last = rules.split(",")
    try:
        pairs = [rule.split(":") for rule in firsts]
        steps = tuple((float(factor), int(end)) for factor, end in pairs)
        final = float(last)
    except ValueError:
        raise ValueError(f'rules {rules!r}: expected "FACTOR:STEP,…,FACTOR", for example "1:1000,0.1"') from None
    ends = [end for _, end in steps]
    if ends != sorted(set(ends)) or any(not 0 <= factor < math.inf for factor in (*(f for f, _ in steps), final)):
        raise ValueError(f"rules {rules!r}: steps must rise, factors must not be negative")
    return steps, final
