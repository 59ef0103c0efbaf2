"""Batches of examples with the item features they need, fetched once per distinct item."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from recsys_ray.graph.activity import UNTOUCHED
from recsys_ray.two_tower.features import ItemRows, ItemTables, UserInputs
from recsys_ray.two_tower.rows import Examples, histories_of
from recsys_ray.two_tower.towers import TowerSpec


@runtime_checkable
class FeatureSource(Protocol):
    """Where item features come from: DGL partitions in training, arrays in evaluation and tests."""

    def features(self, name: str, gids: Int64[Tensor, "N"]) -> Float[Tensor, "N d"]: ...


@dataclass(frozen=True)
class ItemFeatures:
    """The catalogue's narrow features, small enough for every rank."""

    ntype: Int64[Tensor, "items"]
    language: Int64[Tensor, "items"]  # 0: unknown
    categories: Int64[Tensor, "c"]
    category_offsets: Int64[Tensor, "items_plus_1"]
    activity: Mapping[str, Float[Tensor, "items A"]]  # by snapshot (recsys_ray/graph/activity.py)
    gids: Int64[Tensor, "items"] | None = None  # the items' numbers in training; None: their places here

    def rows(self, gids: Int64[Tensor, "N"], snapshot: str, text: Tensor, hgnn: Tensor | None) -> ItemRows:
        counts = self.category_offsets.diff()[gids]
        offsets = torch.cumsum(counts, 0) - counts
        within = torch.arange(int(counts.sum())) - torch.repeat_interleave(offsets, counts)
        flat = self.categories[torch.repeat_interleave(self.category_offsets[gids], counts) + within]
        alive = self.activity[snapshot][gids].float()
        owners = self.owners(gids, snapshot)
        return ItemRows(owners, text, hgnn, alive, self.ntype[gids], self.language[gids], flat, offsets)

    def owners(self, gids: Int64[Tensor, "N"], snapshot: str) -> Int64[Tensor, "N"]:
        """Whose learned vector each item may show: its own, or none (-1) while it has no interactions. A new item has
        none in the test either, and the towers have to learn to handle that."""
        numbers = gids if self.gids is None else self.gids[gids]
        return torch.where(self.activity[snapshot][gids, UNTOUCHED] > 0, -1, numbers)


class ArrayFeatures:
    """Features held in memory: evaluation, the bundle, tests."""

    def __init__(self, **tables: Tensor | np.ndarray) -> None:
        self.tables = {name: torch.as_tensor(table) for name, table in tables.items()}

    def features(self, name: str, gids: Int64[Tensor, "N"]) -> Float[Tensor, "N d"]:
        return self.tables[name][gids].float()


@dataclass(frozen=True)
class Batch:
    """One step's input. ``candidates`` are the distinct targets of the batch, ascending."""

    inputs: UserInputs  # gids are rows of tables
    tables: ItemTables
    rows: ItemRows
    candidates: Int64[Tensor, "C"]
    target: Int64[Tensor, "B"]  # column of each example's own target
    not_negative: Bool[Tensor, "B C"]  # seen by the user, or of another type than the target
    snapshot: int  # that all examples and features are as of


def tables_for(
    source: FeatureSource, spec: TowerSpec, catalogue: ItemFeatures, snapshot: str, gids: Int64[Tensor, "N"]
) -> ItemTables:
    """Text vectors and HGNN embeddings (as of ``snapshot``) of these items, and whose learned vectors they may show."""
    hgnn = source.features(f"hgnn_{snapshot}", gids) if spec.hgnn_dim else None
    text, owners = source.features("text", gids), catalogue.owners(gids, snapshot)
    return ItemTables(text=text, hgnn=hgnn, ntype=catalogue.ntype[gids], owners=owners)


def user_inputs(examples: Examples, rows: np.ndarray, spec: TowerSpec) -> UserInputs:
    """The users of these example rows; ``gids`` are still gids."""
    history, event, offsets = (torch.from_numpy(part).long() for part in histories_of(examples, rows))
    tastes = {name: torch.from_numpy(examples[f"taste_{name}"][rows]) for name in spec.tastes}
    return UserInputs(
        gids=history,
        events=event,
        offsets=offsets,
        age=torch.from_numpy(examples["age"][rows]),
        country=torch.from_numpy(examples["country_index"][rows]),
        tastes=tastes,
    )


def make_batch(
    examples: Examples, rows: np.ndarray, spec: TowerSpec, source: FeatureSource, catalogue: ItemFeatures,
    names: Mapping[int, str],
) -> Batch:  # fmt: skip
    """Assemble the examples ``rows``, all of one snapshot; ``names`` are the snapshots'."""
    index = int(examples["snapshot"][rows[0]])
    snapshot = names[index]
    users = user_inputs(examples, rows, spec)
    targets = torch.from_numpy(examples["target"][rows]).long()
    candidates, target = torch.unique(targets, return_inverse=True)
    needed, place = torch.unique(torch.cat([users.gids, candidates]), return_inverse=True)
    tables = tables_for(source, spec, catalogue, snapshot, needed)
    local = replace(users, gids=place[: len(users.gids)])
    own = place[len(users.gids) :]
    assert tables.text is not None
    item_rows = catalogue.rows(
        candidates, snapshot, tables.text[own], None if tables.hgnn is None else tables.hgnn[own]
    )
    kinds = catalogue.ntype[candidates]
    not_negative = kinds[target][:, None] != kinds
    row = torch.repeat_interleave(torch.arange(len(rows)), users.offsets.diff())
    column = torch.searchsorted(candidates, users.gids).clamp(max=len(candidates) - 1)
    touched = candidates[column] == users.gids
    not_negative[row[touched], column[touched]] = True
    return Batch(local, tables, item_rows, candidates, target, not_negative, index)


def epoch_batches(
    snapshot: np.ndarray, batch_size: int, steps: int, generator: np.random.Generator
) -> Iterator[np.ndarray]:
    """Shuffled example rows, ``steps`` batches, each of one snapshot (its items' embeddings are as of one moment).

    Ranks with fewer batches repeat some, so that all take the same number of steps.
    """
    batches: list[np.ndarray] = []
    for each in np.unique(snapshot):
        rows = generator.permutation(np.flatnonzero(snapshot == each))
        batches += np.array_split(rows, max(1, round(len(rows) / batch_size)))
    order = generator.permutation(len(batches))
    for step in range(steps):
        yield batches[order[step % len(order)]]


def batches_in(snapshot: np.ndarray, batch_size: int) -> int:
    """How many batches :func:`epoch_batches` makes of these examples."""
    return sum(max(1, round(int((snapshot == each).sum()) / batch_size)) for each in np.unique(snapshot))


def country_index(countries: Sequence[str], values: np.ndarray) -> np.ndarray:
    """Index of each country in the sorted vocabulary, -1 where absent or unknown. int64 [m]."""
    if not len(countries):
        return np.full(len(values), -1, np.int64)
    known = np.asarray(countries)
    place = np.searchsorted(known, values).clip(max=len(known) - 1)
    return np.where(known[place] == values, place, -1).astype(np.int64)
