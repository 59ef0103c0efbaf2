"""How much of a taste is of the moment: chooses the half-life of the recent mean of a user's history.

Beside the plain mean of the history the user tower reads one in which an event ``half_life`` places further back counts
half. Where the next choice follows the last ones (shops, sessions) it is worth much; where tastes are steady it only
adds what can be learned by heart. Which of both the data are, nearest neighbours can tell before anything is trained:
they rank for validation queries by the recent mean alone and by the plain one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from recsys_ray.ranks import seed_from, sum_over_ranks
from recsys_ray.two_tower.batches import tables_for
from recsys_ray.two_tower.rows import histories_of
from recsys_ray.two_tower.towers import recent_weights
from recsys_ray.two_tower.training import DEPTH, TowerTask, smallest_as_good

HALF_LIVES = (0.0, 8.0, 4.0, 2.0, 1.0, 0.25)  # places; 0: the plain mean, .25: hardly more than the last item
_QUERIES = 4_000  # of each rank
_ITEMS = 20_000  # a sample that targets are ranked among
_CHUNK = 256  # queries at once


@torch.no_grad()
def choose_half_life(task: TowerTask, seed: int, snapshot: str = "valid") -> float:
    """The half-life whose mean alone ranks best, by NDCG@100 inside the target's type; 0 where the plain mean is less
    than a standard error behind it, or there is no query. The same on every rank."""
    choices = len(HALF_LIVES)
    gains, together = torch.zeros(choices, dtype=torch.float64), torch.zeros(choices, choices, dtype=torch.float64)
    lengths = np.diff(task.queries["offsets"]) if len(task.queries["target"]) else np.zeros(0)
    asked = np.random.default_rng(seed_from(seed, "half-life")).permutation(np.flatnonzero(lengths))[:_QUERIES]
    sample = np.random.default_rng(seed_from(seed, "start")).permutation(len(task.catalogue.ntype))[:_ITEMS]
    for rows in np.array_split(asked, -(-len(asked) // _CHUNK)) if len(asked) else []:
        places = _places(task, np.sort(rows), sample, snapshot)
        gain = ((places < DEPTH) / torch.log2(places + 2)).double()
        gains, together = gains + gain.sum(0), together + gain.T @ gain
    gains, together = sum_over_ranks(gains), sum_over_ranks(together)
    return HALF_LIVES[smallest_as_good(gains[:, None], together[:, None, :, None])[0]]


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
    places = []
    for half_life in HALF_LIVES:
        weight = recent_weights(offsets, half_life) if half_life else torch.ones(len(history))
        scores = _nearness(vectors, column, weight, user, len(rows))
        limit = scores.gather(1, own[:, None])
        scores[other] = -torch.inf
        places.append((scores > limit).sum(1) + ((scores == limit).sum(1) - 1) / 2)
    return torch.stack(places, 1)


def _nearness(
    vectors: Sequence[Float[Tensor, "items _"]], column: Tensor, weight: Tensor, user: Tensor, users: int
) -> Float[Tensor, "users items"]:
    """The sum of the cosines between items and weighted means."""
    total = torch.zeros(users, len(vectors[0]))
    for table in vectors:
        mean = torch.zeros(users, table.shape[1]).index_add(0, user, table[column] * weight[:, None])
        total += F.normalize(mean, dim=1) @ F.normalize(table, dim=1).T
    return total
