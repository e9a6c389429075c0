"""Which parameters are trained, in which part, and which of them decay: by patterns over their names.

A pattern is a glob over the whole name (`network.down_blocks.*`; `*` also matches dots), or `re:` and a regular
expression that is found anywhere in the name. One that matches nothing is an error: a slip would freeze nothing.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

NEVER_DECAYED = re.compile(r"(^|\.)clip_img_mapper\.weight$")
"""Its gradient is an exact zero when no image goes in, so that decay alone would move it, run after run."""


class PatternError(ValueError):
    """A pattern over parameter names matches nothing, or cannot be read."""


@dataclass(frozen=True)
class Frozen:
    """What a list of patterns froze."""

    num_tensors: int
    num_elements: int
    num_trained_elements: int
    """Elements of the module that are still trained."""
    by_pattern: Mapping[str, int]
    """Tensors that each pattern matches, in the order of the config."""

    def __str__(self) -> str:
        listing = ", ".join(f"{pattern!r}: {count:,}" for pattern, count in self.by_pattern.items())
        return (
            f"frozen: {self.num_tensors:,} tensors, {self.num_elements:,} elements ({listing}); "
            f"{self.num_trained_elements:,} elements are trained"
        )


def matching(
    names: Iterable[str], patterns: Sequence[str], *, key: str, what: str = "parameter"
) -> dict[str, list[str]]:
    """Return {pattern: names that it matches}. key: the setting that holds the patterns; what: they name; for messages.

    Raises PatternError that lists every pattern without a match, or that is no regular expression.
    """
    known = list(names)
    found = {pattern: [name for name in known if _matches(name, pattern, key)] for pattern in patterns}
    if unmatched := [pattern for pattern, hits in found.items() if not hits]:
        examples = ", ".join(known[:3] + known[-1:]) or "none"
        listing = ", ".join(map(repr, unmatched))
        raise PatternError(f"{key}: {listing} matches no {what} of {len(known):,}; they are named {examples}")
    return found


def _matches(name: str, pattern: str, key: str) -> bool:
    if not pattern.startswith("re:"):
        return fnmatchcase(name, pattern)
    try:
        return re.search(pattern[3:], name) is not None
    except re.error as error:
        raise PatternError(f"{key}: {pattern!r} is not a regular expression: {error}") from error


def freeze(module: nn.Module, patterns: Sequence[str]) -> Frozen:
    """Switch gradients off for the parameters that the patterns match; say what was switched off.

    Raises PatternError, also when nothing is left to train.
    """
    parameters = dict(module.named_parameters())
    found = matching(parameters, patterns, key="optimizer.freeze")
    hit = {name for names in found.values() for name in names}
    for name in hit:
        parameters[name].requires_grad_(False)
    num_trained = sum(parameter.numel() for parameter in parameters.values() if parameter.requires_grad)
    if not num_trained:
        raise PatternError(f"optimizer.freeze: {', '.join(map(repr, patterns))} leaves nothing to train")
    counts = {pattern: len(names) for pattern, names in found.items()}
    return Frozen(len(hit), sum(parameters[name].numel() for name in hit), num_trained, counts)


def split_parts(
    parts: Mapping[str, Iterable[nn.Parameter]],
    names: Mapping[nn.Parameter, str],
    own: Mapping[str, Sequence[str]],
) -> dict[str, list[nn.Parameter]]:
    """Return trained parameters by part, those that `own` names ({part: patterns}) taken out of the recipe's parts.

    Raises PatternError for a part named like one of the recipe's, and for a parameter in two parts of `own`.
    """
    split = {part: [p for p in parameters if p.requires_grad] for part, parameters in parts.items()}
    by_name = {names[parameter]: parameter for members in split.values() for parameter in members}
    taken: dict[str, str] = {}
    for part, patterns in own.items():
        if part in parts:
            raise PatternError(f"optimizer.parts: {part!r} is a part of the recipe; choose another name")
        found = matching(by_name, patterns, key=f"optimizer.parts.{part}")
        for name in dict.fromkeys(name for hits in found.values() for name in hits):
            if name in taken:
                raise PatternError(f"optimizer.parts: {name} is in {taken[name]!r} and in {part!r}")
            taken[name] = part
    for part, members in split.items():
        split[part] = [parameter for parameter in members if names[parameter] not in taken]
    for part in own:
        split[part] = [by_name[name] for name, owner in taken.items() if owner == part]
    return {part: members for part, members in split.items() if members}


def undecayed(names: Mapping[nn.Parameter, str], patterns: Sequence[str], *, decay_vectors: bool) -> set[nn.Parameter]:
    """Return the trained parameters that weight decay leaves alone.

    decay_vectors: whether parameters of at most one dimension (biases, scales of norms) decay. Raises PatternError.
    """
    by_name = {name: parameter for parameter, name in names.items() if parameter.requires_grad}
    found = matching(by_name, patterns, key="optimizer.no_decay")
    exempt = {by_name[name] for hits in found.values() for name in hits}
    for name, parameter in by_name.items():
        if NEVER_DECAYED.search(name) or (parameter.dim() <= 1 and not decay_vectors):
            exempt.add(parameter)
    return exempt
