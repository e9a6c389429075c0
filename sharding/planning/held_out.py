"""Choose which pictures are set aside for validation, and which may then not be trained.

Pictures that are relatives (`dedupe/relatives`: they show nearly the same) stay on one side. What has been held out
stays held out; what a run has trained is never held out, nor its relatives. Where new relations make both true at
once, the trained side wins and the held-out picture is used for neither.
A pure function of tables; `plan` reads and writes them.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sharding.keys import key_array, key_numbers
from sharding.planning.order import are_sealed, name_codes, places, shuffled_ranks
from sharding.schema import HELD_OUT, PLAN

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Separation:
    """What is held out, and what is left of the kept keys for training."""

    held_out: pa.Table
    """PLAN rows of the held-out chunks, by dataset and position."""
    is_trainable: Array
    """Of each row of `current`: neither held out nor dropped."""
    related_to_held_out: Array
    """(rows, 2): rows of `current` that are dropped because a relative is held out, and the row of that relative."""
    related_to_trained: Array
    """(rows, 2): rows that were held out and are dropped because a relative has been trained, and that relative."""


def separate(
    previous: pa.Table,
    current: pa.Table,
    *,
    size: int,
    max_fraction: float,
    seed: int,
    sealed: Collection[tuple[str, int]] = (),
    trained: pa.Table | None = None,
    relatives: pa.Table | None = None,
) -> Separation:
    """Hold out `size` pictures per dataset, but at most max_fraction of it; size 0 releases what was held out.

    previous: the plan so far (PLAN). current: kept keys, each once (plan_rows.CURRENT). sealed: (dataset, chunk) that
    a run uses; a sealed held-out chunk is not changed. trained: further keys (column `key`) that a run has trained.
    relatives: RELATIVES.

    What is missing is chosen by a seeded shuffle from new keys and those of the dataset's last chunk, then from
    earlier chunks that are not sealed, the last first, so that few tars are written anew.
    """
    if not size and not (previous.column("chunk").to_numpy() == HELD_OUT).any():
        nothing = np.empty((0, 2), dtype=np.int64)
        return Separation(PLAN.empty_table(), np.ones(current.num_rows, dtype=bool), nothing, nothing)
    state = _State.of(previous, current, sealed=sealed, trained=trained, relatives=relatives, seed=seed)
    held = state.was_held & ((size > 0) | state.is_frozen)
    is_tainted = state.in_component_of(state.is_trained) & held & ~state.is_frozen
    held &= ~is_tainted
    if size:
        _fill_up(state, held, quotas=np.minimum(size, (state.counts() * max_fraction).astype(np.int64)))
    is_related = state.in_component_of(held) & ~held & ~state.is_trained & ~is_tainted
    return Separation(
        held_out=_held_rows(state, previous, current, held),
        is_trainable=~held & ~is_related & ~is_tainted,
        related_to_held_out=state.with_relative(is_related, among=held),
        related_to_trained=state.with_relative(is_tainted, among=state.is_trained),
    )


@dataclass(frozen=True)
class _State:
    """Facts about each row of `current`, as arrays."""

    names: list[str]
    """Datasets."""
    dataset: Array
    """Number of its dataset in names: where it is held out, else where it is filed."""
    component: Array
    """Dense number of its component; -1 without relatives."""
    num_components: int
    was_held: Array
    frozen: frozenset[str]
    """Datasets whose held-out chunk is sealed."""
    is_frozen: Array
    """Its dataset is one of these."""
    is_trained: Array
    tier: Array
    """0 for a new row, else how many chunks its dataset has after its own."""
    rank: Array
    """In the seeded shuffle of its dataset."""

    @classmethod
    def of(
        cls, previous: pa.Table, current: pa.Table, *, sealed: Collection[tuple[str, int]], trained: pa.Table | None,
        relatives: pa.Table | None, seed: int,
    ) -> "_State":  # fmt: skip
        keys = key_numbers(current.column("key"))
        names, dataset = name_codes(current.column("dataset"))
        place = places(key_numbers(previous.column("key")), keys)
        is_planned = place >= 0
        if previous.num_rows:
            chunks = np.where(is_planned, previous.column("chunk").to_numpy()[place], 0)
            is_sealed = is_planned & are_sealed(previous, sealed)[place]
            tier = np.where(is_planned, _tiers(previous)[place], 0)
        else:
            chunks, is_sealed, tier = np.zeros((3, len(keys)), dtype=np.int64)
        was_held = is_planned & (chunks == HELD_OUT)
        if was_held.any():  # it stays where it was held out, wherever it is filed now
            held_names = previous.column("dataset").take(pa.array(place[was_held])).to_pylist()
            names = sorted({*names, *held_names})
            dataset = np.array([names.index(name) for name in name_codes(current.column("dataset"))[0]])[dataset]
            dataset[was_held] = [names.index(name) for name in held_names]
        is_trained = is_sealed.astype(bool) & ~was_held
        if trained is not None:
            is_trained |= places(key_numbers(trained.column("key")), keys) >= 0
        frozen = frozenset(name for name, chunk in sealed if chunk == HELD_OUT)
        is_frozen = np.isin(dataset, [number for number, name in enumerate(names) if name in frozen])
        component, num_components = _components(keys, relatives)
        return cls(
            names, dataset, component, num_components, was_held, frozen, is_frozen, is_trained & ~was_held, tier,
            _ranks(current, dataset, names, seed),
        )  # fmt: skip

    def counts(self) -> Array:
        """Return the number of rows by dataset."""
        return np.bincount(self.dataset, minlength=len(self.names))

    def in_component_of(self, rows: Array) -> Array:
        """Tell for each row whether one of its relatives, or itself, is among `rows` (a mask)."""
        touched = np.zeros(self.num_components + 1, dtype=bool)
        touched[self.component[rows]] = True
        touched[-1] = False  # where rows without relatives point
        found: Array = touched[self.component] | rows
        return found

    def with_relative(self, rows: Array, *, among: Array) -> Array:
        """Return (rows, 2): the rows of a mask, each with a relative from another one."""
        relative = np.full(self.num_components, -1)
        relative[self.component[among & (self.component >= 0)]] = np.flatnonzero(among & (self.component >= 0))
        chosen = np.flatnonzero(rows)
        return np.stack([chosen, relative[self.component[chosen]]], axis=1)


def _fill_up(state: _State, held: Array, *, quotas: Array) -> None:
    """Add whole components, or single rows, to the mask `held` until each dataset has its quota."""
    is_candidate = ~held & ~state.is_frozen & ~state.in_component_of(state.is_trained | held)
    related = np.flatnonzero(state.component >= 0)
    related = related[np.argsort(state.component[related], kind="stable")]
    starts = np.searchsorted(state.component[related], np.arange(state.num_components + 1))
    num_held = np.bincount(state.dataset[held], minlength=len(state.names))
    for number in range(len(state.names)):
        if num_held[number] >= quotas[number]:
            continue
        rows = np.flatnonzero(is_candidate & (state.dataset == number))
        rows = rows[np.lexsort((state.rank[rows], state.tier[rows]))]
        seen: set[int] = set()
        for row in rows.tolist():
            if num_held[number] >= quotas[number]:
                break
            component = int(state.component[row])
            if component in seen:
                continue
            members = np.array([row])
            if component >= 0:
                seen.add(component)
                members = related[starts[component] : starts[component + 1]]
            added = np.bincount(state.dataset[members], minlength=len(state.names))
            if is_candidate[members].all() and (num_held + added <= quotas).all(where=added > 0):
                held[members] = True
                is_candidate[members] = False
                num_held += added


def _held_rows(state: _State, previous: pa.Table, current: pa.Table, held: Array) -> pa.Table:
    """Return the rows of the held-out chunks; those of a sealed one as they were."""
    was_held_out = previous.filter(pc.equal(previous.column("chunk"), HELD_OUT))
    tables = [PLAN.empty_table()]
    for name in sorted({*state.names, *state.frozen}):
        if name in state.frozen:
            tables.append(was_held_out.filter(pc.equal(was_held_out.column("dataset"), name)))
            continue
        rows = np.flatnonzero(held & (state.dataset == state.names.index(name)))
        rows = rows[np.argsort(state.rank[rows])]
        chosen = current.take(pa.array(rows))
        columns = {
            "key": chosen.column("key"),
            "dataset": pa.array([name] * len(rows), pa.string()),
            "period": chosen.column("period"),
            "chunk": pa.array(np.full(len(rows), HELD_OUT), pa.int32()),
            "position": pa.array(np.arange(len(rows)), pa.int32()),
            "repeats": pa.array(np.ones(len(rows)), pa.int32()),
            "loss_weight": pa.array(np.ones(len(rows)), pa.float32()),
        }
        tables.append(pa.table([columns[column] for column in PLAN.names], schema=PLAN))
    return pa.concat_tables(tables)


# --- arrays ---


def _tiers(previous: pa.Table) -> Array:
    _, codes = name_codes(previous.column("dataset"))
    chunks = previous.column("chunk").to_numpy().astype(np.int64)
    last = np.full(int(codes.max(initial=0)) + 1, -1)
    np.maximum.at(last, codes, chunks)
    tiers: Array = last[codes] - chunks
    return tiers


def _components(keys: Array, relatives: pa.Table | None) -> tuple[Array, int]:
    if relatives is None or not relatives.num_rows:
        return np.full(len(keys), -1), 0
    numbers, dense = np.unique(relatives.column("component").to_numpy(), return_inverse=True)
    place = places(key_numbers(relatives.column("key")), keys)
    return np.where(place >= 0, dense[place], -1), len(numbers)


def _ranks(current: pa.Table, dataset: Array, names: list[str], seed: int) -> Array:
    ranks = np.zeros(current.num_rows, dtype=np.int64)
    for number, name in enumerate(names):
        rows = np.flatnonzero(dataset == number)
        keys = key_array(current.column("key").take(pa.array(rows)))
        ranks[rows] = shuffled_ranks(keys, seed=seed, salt=f"held out/{name}")
    return ranks
