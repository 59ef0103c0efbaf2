"""Decides before training whether recent events matter more: whether the user tower reads the last item and means over
the latest events beside the mean of all, and the memory's half-life.

Where the next choice follows the last ones (shops, sessions), the last item is informative; where tastes are steady, it
only adds something to overfit. Nearest neighbours reveal which is the case: they rank validation queries by the plain
mean of the history and by means that favour the latest events, and the memory ranks alone with several half-lives.
Means over the latest events add to the last item and the mean of all only if histories are much longer than their
half-life.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from recsys_ray.cluster.train import sum_over_ranks
from recsys_ray.core.seeds import seed_from
from recsys_ray.scoring.choose import first_as_good, gain_of, places, recalled_by
from recsys_ray.scoring.memory import HALF_LIVES as OF_THE_MEMORY
from recsys_ray.scoring.memory import RIDGES, Memory
from recsys_ray.two_tower.batches import tables_for
from recsys_ray.two_tower.rows import histories_of
from recsys_ray.two_tower.towers import recent_weights
from recsys_ray.two_tower.training import TowerTask, queries_by_type

RECENT = (4.0, 16.0)  # half-lives of means of the latest
_LONG = 4  # times a half-life: of such histories
HALF_LIVES = (None, 4.0, 2.0, 1.0, 0.25)  # places back at which an event counts half; None: all alike
_QUERIES = 4_000  # of each rank
_ITEMS = 20_000  # a sample that targets are ranked among
_CHUNK = 256  # queries at once


def with_recency(task: TowerTask, seed: int) -> TowerTask:
    """The task with what its data say in its specs; a given ``last_item`` stays. The same on every rank."""
    spec, score = task.spec, task.score
    if spec.last_item is None:
        spec = replace(spec, last_item=last_items_tell(task, seed))
    if spec.last_item:
        far = mean_length(task) / _LONG
        spec = replace(spec, recent=[half_life for half_life in RECENT if half_life <= far])
    if task.moment.memory is not None:
        score = replace(score, half_life=memory_half_life(task, task.moment.memory, seed))
    return replace(task, spec=spec, score=score)


@torch.no_grad()
def last_items_tell(task: TowerTask, seed: int, snapshot: str = "valid") -> bool:
    """Whether one of ``HALF_LIVES`` ranks better than the plain mean, by NDCG@100 inside the target's type and by a
    standard error of the difference or more. False where there is no query; the same on every rank."""
    choices = len(HALF_LIVES)
    gains, together = torch.zeros(choices, dtype=torch.float64), torch.zeros(choices, choices, dtype=torch.float64)
    asked = _sample(task, seed)
    sample = np.random.default_rng(seed_from(seed, "start")).permutation(len(task.catalogue.ntype))[:_ITEMS]
    for rows in np.array_split(asked, -(-len(asked) // _CHUNK)) if len(asked) else []:
        gain = gain_of(_places(task, np.sort(rows), sample, snapshot))
        gains, together = gains + gain.sum(0), together + gain.T @ gain
    gains, together = sum_over_ranks(gains), sum_over_ranks(together)
    return first_as_good(gains, together) > 0


def mean_length(task: TowerTask) -> float:
    """Events in the history of a validation query, in the mean over all ranks; 0 where there is no query."""
    lengths = _lengths(task)
    total, number = sum_over_ranks(torch.tensor([lengths.sum(), len(lengths)], dtype=torch.float64))
    return float(total / number.clamp(min=1))


def memory_half_life(task: TowerTask, memory: Memory, seed: int) -> float | None:
    """With which half-life of the history the memory alone ranks best (NDCG@100), with the ridge that suits it; the
    longest of equal ones. The same on every rank."""
    gains = torch.zeros(len(OF_THE_MEMORY), len(RIDGES), dtype=torch.float64)
    for asked in queries_by_type(None, task, "valid", _sample(task, seed)):
        for place, half_life in enumerate(OF_THE_MEMORY):
            scores = asked.without_history(torch.zeros(len(asked), asked.count), asked.first)
            recalled = recalled_by(asked, memory, half_life)
            gains[place] += gain_of(places(scores, asked.target, recalled, asked.first, (1.0,)))[:, 0].sum(0)
    best = sum_over_ranks(gains).amax(1)
    return OF_THE_MEMORY[int((best == best.max()).nonzero()[-1])]


def _lengths(task: TowerTask) -> Int[np.ndarray, "queries"]:
    """Events in the history of each validation query of this rank."""
    return np.diff(task.queries["offsets"]) if len(task.queries["target"]) else np.zeros(0, np.int64)


def _sample(task: TowerTask, seed: int) -> Int[np.ndarray, "n"]:
    """Some validation queries with a history."""
    return np.random.default_rng(seed_from(seed, "last item")).permutation(np.flatnonzero(_lengths(task)))[:_QUERIES]


def _places(task: TowerTask, rows: np.ndarray, sample: np.ndarray, snapshot: str) -> Float[Tensor, "queries choices"]:
    """The place of each query's target among the items of its type in the sample, without those of the history."""
    history, _, offsets = (torch.from_numpy(part).long() for part in histories_of(task.queries, rows))
    target = torch.from_numpy(task.queries["target"][rows]).long()
    items = torch.unique(torch.cat([torch.from_numpy(sample), target, history]))
    tables = tables_for(task.source, task.spec, task.catalogue, snapshot, items)
    vectors = [table.float() - table.float().mean(0) for table in (tables.text, tables.hgnn) if table is not None]
    column, own = torch.searchsorted(items, history), torch.searchsorted(items, target)
    user = torch.repeat_interleave(torch.arange(len(rows)), offsets.diff())
    other = task.catalogue.ntype[items] != task.catalogue.ntype[target][:, None]
    other[user, column] = True
    found = []
    for half_life in HALF_LIVES:
        weight = torch.ones(len(history)) if half_life is None else recent_weights(offsets, half_life)
        scores = _nearness(vectors, column, weight, user, len(rows))
        limit = scores.gather(1, own[:, None])
        scores[other] = -torch.inf
        found.append((scores > limit).sum(1) + ((scores == limit).sum(1) - 1) / 2)
    return torch.stack(found, 1)


def _nearness(
    vectors: Sequence[Float[Tensor, "items _"]], column: Tensor, weight: Tensor, user: Tensor, users: int
) -> Float[Tensor, "users items"]:
    """The sum of the cosines between items and weighted means."""
    total = torch.zeros(users, len(vectors[0]))
    for table in vectors:
        mean = torch.zeros(users, table.shape[1]).index_add(0, user, table[column] * weight[:, None])
        total += F.normalize(mean, dim=1) @ F.normalize(table, dim=1).T
    return total
