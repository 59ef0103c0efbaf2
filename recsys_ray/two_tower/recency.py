"""How much of a taste is of the moment: decides whether the user tower reads the last item beside the mean of all.

Where the next choice follows the last ones (shops, sessions) it tells much; where tastes are steady it only adds what
can be learned by heart. Which of both the data are, nearest neighbours can say before anything is trained: they rank
for validation queries by the plain mean of the history and by means in which the latest events count for more.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from recsys_ray.ranks import seed_from, sum_over_ranks
from recsys_ray.two_tower.batches import tables_for
from recsys_ray.two_tower.rows import histories_of
from recsys_ray.two_tower.training import DEPTH, TowerTask, smallest_as_good

HALF_LIVES = (None, 4.0, 2.0, 1.0, 0.25)  # places back at which an event counts half; None: all alike
_QUERIES = 4_000  # of each rank
_ITEMS = 20_000  # a sample that targets are ranked among
_CHUNK = 256  # queries at once


@torch.no_grad()
def last_items_tell(task: TowerTask, seed: int, snapshot: str = "valid") -> bool:
    """Whether one of ``HALF_LIVES`` ranks better than the plain mean, by NDCG@100 inside the target's type and by a
    standard error of the difference or more. False where there is no query; the same on every rank."""
    choices = len(HALF_LIVES)
    gains, together = torch.zeros(choices, dtype=torch.float64), torch.zeros(choices, choices, dtype=torch.float64)
    lengths = np.diff(task.queries["offsets"]) if len(task.queries["target"]) else np.zeros(0)
    asked = np.random.default_rng(seed_from(seed, "last item")).permutation(np.flatnonzero(lengths))[:_QUERIES]
    sample = np.random.default_rng(seed_from(seed, "start")).permutation(len(task.catalogue.ntype))[:_ITEMS]
    for rows in np.array_split(asked, -(-len(asked) // _CHUNK)) if len(asked) else []:
        places = _places(task, np.sort(rows), sample, snapshot)
        gain = ((places < DEPTH) / torch.log2(places + 2)).double()
        gains, together = gains + gain.sum(0), together + gain.T @ gain
    gains, together = sum_over_ranks(gains), sum_over_ranks(together)
    return smallest_as_good(gains[:, None], together[:, None, :, None])[0] > 0


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
        weight = torch.ones(len(history)) if half_life is None else recent_weights(offsets, half_life)
        scores = _nearness(vectors, column, weight, user, len(rows))
        limit = scores.gather(1, own[:, None])
        scores[other] = -torch.inf
        places.append((scores > limit).sum(1) + ((scores == limit).sum(1) - 1) / 2)
    return torch.stack(places, 1)


def recent_weights(offsets: Int64[Tensor, "users_plus_1"], half_life: float) -> Float[Tensor, "events"]:
    """1 for a user's last event, half of it for the one ``half_life`` places before."""
    back = torch.repeat_interleave(offsets[1:], offsets.diff()) - 1 - torch.arange(int(offsets[-1]))
    return 0.5 ** (back / half_life)


def _nearness(
    vectors: Sequence[Float[Tensor, "items _"]], column: Tensor, weight: Tensor, user: Tensor, users: int
) -> Float[Tensor, "users items"]:
    """The sum of the cosines between items and weighted means."""
    total = torch.zeros(users, len(vectors[0]))
    for table in vectors:
        mean = torch.zeros(users, table.shape[1]).index_add(0, user, table[column] * weight[:, None])
        total += F.normalize(mean, dim=1) @ F.normalize(table, dim=1).T
    return total
