"""Which share of what is to come items that nobody had are given, by the examples and the validation queries (blank.py
says what a share does)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from recsys_ray.cluster.train import sum_over_ranks
from recsys_ray.graph.activity import CHOSEN
from recsys_ray.scoring.unseen import Period, share_ahead
from recsys_ray.two_tower.towers import TwoTower
from recsys_ray.two_tower.training import TowerTask, sample_of_queries, user_vectors

_CHUNK = 512  # queries at once


def blank_shares(
    task: TowerTask, snapshot: str, ahead: int, lately: int, cuts: Mapping[int, int]
) -> list[float | None]:
    """Of each type the share of what comes after a snapshot that goes to items that nobody had (:func:`share_ahead`):
    by the validation queries, and the examples since each cut, of all ranks.

    Args:
        ahead, lately: seconds of the period to come, and of validation.
        cuts: indices of snapshots -> seconds from each to validation.
    """
    examples = task.examples
    before = [
        _period(task, cuts[cut], examples["target"][examples["snapshot"] >= cut], task.snapshot_names[cut])
        for cut in sorted(cuts, reverse=True)
    ]
    return share_ahead(ahead, _number(task, snapshot), _period(task, lately, task.queries["target"], "valid"), before)


def some_users(model: TwoTower, task: TowerTask, snapshot: str) -> Float[Tensor, "B D"]:
    """Vectors as of a snapshot of the users of :func:`sample_of_queries`."""
    rows = sample_of_queries(task)
    parts = np.array_split(rows, -(-len(rows) // _CHUNK)) if len(rows) else []
    found = [user_vectors(model, task.source, task.catalogue, snapshot, task.queries, part) for part in parts]
    return torch.cat(found) if found else torch.zeros(0, task.spec.layers[-1])


def _period(task: TowerTask, seconds: int, target: np.ndarray, moment: str) -> Period:
    """Of targets of all ranks that were chosen after a snapshot."""
    ntype, targets = task.catalogue.ntype, torch.from_numpy(target).long()
    parts = targets, targets[_blank(task, moment)[targets]]
    counts = torch.stack([torch.bincount(ntype[part], minlength=task.spec.num_types) for part in parts])
    chosen, new = sum_over_ranks(counts.double())
    return Period(seconds, chosen, new, _number(task, moment))


def _number(task: TowerTask, moment: str) -> Float[Tensor, "types"]:
    """How many items nobody had."""
    return torch.bincount(task.catalogue.ntype[_blank(task, moment)], minlength=task.spec.num_types).double()


def _blank(task: TowerTask, moment: str) -> Bool[Tensor, "items"]:
    return task.catalogue.activity[moment][:, CHOSEN] == 0
