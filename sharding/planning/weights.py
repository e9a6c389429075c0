"""How often each picture is shown and what it counts: the rules of `[[plan.weights]]` applied to records.

Knows nothing of chunks; `plan` decides where the numbers go. Held-out pictures always count once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sharding.config import WeightRule
from sharding.schema import TAG_CATEGORIES


@dataclass(frozen=True)
class Weights:
    """Of some rows, in their order. repeats: int32; loss_weight: float32."""

    repeats: np.ndarray[Any, Any]
    loss_weight: np.ndarray[Any, Any]


def columns_needed(rules: Sequence[WeightRule]) -> list[str]:
    """Return the columns of the kept records that `weigh` asks for."""
    columns = [f"tags_{name}" for name in TAG_CATEGORIES] if any(rule.tags for rule in rules) else []
    columns += ["rating"] if any(rule.ratings for rule in rules) else []
    return columns + (["custom"] if any(rule.custom for rule in rules) else [])


def weigh(records: pa.Table, rules: Sequence[WeightRule]) -> Weights:
    """Return what the rules give each record: the last rule that applies and sets a value decides about that value.

    records: columns `source`, `dataset` (as filed) and `columns_needed(rules)`.
    """
    weights = Weights(np.ones(records.num_rows, np.int32), np.ones(records.num_rows, np.float32))
    for rule in rules:
        applies = _applies(records, rule)
        if rule.repeats is not None:
            weights.repeats[applies] = rule.repeats
        if rule.loss_weight is not None:
            weights.loss_weight[applies] = rule.loss_weight
    return weights


def _applies(records: pa.Table, rule: WeightRule) -> np.ndarray[Any, Any]:
    applies = np.ones(records.num_rows, dtype=bool)
    for column, name in (("dataset", rule.dataset), ("source", rule.source)):
        if name:
            applies &= _truth(pc.equal(records.column(column), name))
    if rule.ratings:
        applies &= _truth(pc.is_in(records.column("rating"), value_set=pa.array(rule.ratings)))
    if rule.tags:
        wanted = pa.array(rule.tags, pa.string())
        applies &= np.logical_or.reduce(
            [_has_one(records.column(f"tags_{name}"), wanted) for name in TAG_CATEGORIES]
        )  # fmt: skip
    for name, value in rule.custom.items():
        facts = pc.map_lookup(records.column("custom"), pa.scalar(name), "first")
        applies &= _truth(pc.equal(facts, value))
    return applies


def _has_one(lists: pa.ChunkedArray, wanted: pa.Array) -> np.ndarray[Any, Any]:
    """Tell for each list whether it holds one of the wanted values."""
    found = np.zeros(len(lists), dtype=bool)
    rows = pc.list_parent_indices(lists).to_numpy()
    found[rows[_truth(pc.is_in(pc.list_flatten(lists), value_set=wanted))]] = True
    return found


def _truth(values: pa.ChunkedArray) -> np.ndarray[Any, Any]:
    truth: np.ndarray[Any, Any] = pc.fill_null(values, False).to_numpy()
    return truth
