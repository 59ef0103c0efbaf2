"""Steps, negatives and losses that the trained baselines share. Ranking is inside one item type, so negatives are of
the positive's type."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, embedding, softplus

from recsys_ray.baselines.interface import Watch
from recsys_ray.data.tables import Catalogue
from recsys_ray.evaluation.ranking import Recommender


def train(
    optimizer: torch.optim.Optimizer,
    epochs: int,
    losses: Callable[[int], Iterable[Tensor]],
    watch: Watch | None,
    current: Callable[[], Recommender],
) -> None:
    """A step for each loss of each epoch (counted from 1), until ``watch`` has seen enough."""
    for epoch in range(1, epochs + 1):
        for loss in losses(epoch):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if watch is not None and watch(epoch, current):
            break


def by_type(catalogue: Catalogue, items: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """(first gid, last gid, places) for each item type among ``items`` (int64 [n])."""
    kind = torch.bucketize(items, torch.from_numpy(catalogue.bounds), right=True) - 1
    for number in kind.unique().tolist():
        yield *catalogue.range_of(number), (kind == number).nonzero()[:, 0]


def softmax_loss(
    queries: Tensor, items: Tensor, table: Tensor, catalogue: Catalogue, negatives: int, draw: torch.Generator
) -> Tensor:
    """Sum over positives of the cross-entropy against ``negatives`` items, drawn uniformly from the positive's type and
    shared by the batch; a negative that is the positive itself does not count.

    Args:
        queries: [n, d], scores are inner products with ``table`` [items, d].
        items: int64 [n], the positives.
    """
    total = queries.new_zeros(())
    for first, last, place in by_type(catalogue, items):
        drawn = torch.randint(first, last, (negatives,), generator=draw)
        query, positive = embedding(place, queries), items[place]
        own = (query * embedding(positive, table)).sum(1, keepdim=True)
        others = (query @ embedding(drawn, table).T).masked_fill(positive[:, None] == drawn, -torch.inf)
        target = torch.zeros(len(place), dtype=torch.int64)
        total = total + cross_entropy(torch.cat([own, others], dim=1), target, reduction="sum")
    return total


def bpr_loss(queries: Tensor, items: Tensor, table: Tensor, catalogue: Catalogue, draw: torch.Generator) -> Tensor:
    """Sum over positives of -log sigmoid(score - score of one item drawn uniformly from the type) (Rendle 2009)."""
    first, last = (torch.from_numpy(catalogue.bounds[k:][: len(catalogue.types)]) for k in (0, 1))
    kind = torch.bucketize(items, torch.from_numpy(catalogue.bounds), right=True) - 1
    share = torch.rand(len(items), generator=draw, dtype=torch.float64)
    drawn = first[kind] + (share * (last - first)[kind]).long()
    gap = (queries * (embedding(items, table) - embedding(drawn, table))).sum(1)
    return softplus(-gap).sum()


def batch_size(examples: int, most: int) -> int:
    """Small data still take 50 steps an epoch."""
    return int(np.clip(examples // 50, 64, most))
