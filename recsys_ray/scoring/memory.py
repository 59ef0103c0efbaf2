"""Direct memory beside the towers: what users who had the items of the history chose as well.

Two vectors of 128 numbers generalise; they cannot hold every pair of items that belong together. The co-interaction
graph has these pairs, so its edges are also used as they are, like the wide part beside a deep one (Cheng et al., Wide
& Deep Learning for Recommender Systems, DLRS 2016; ours, not the papers'):

    score(u, j) = <u, v_j> + w * log(1 + max(m_uj, 0) / SMALL),    m_uj = sum over i in history of u of a_ui * b_ij
    a_ui proportional to 2^(-places back / half-life), their sum 1; of the latest REACH items

The memory knows no pair of an item that nobody had (``users`` 0). Such a blank item is given what
recsys_ray/scoring/unseen.py says, and then keeps its place among the others of its type (:func:`place_kept`): else
every new item would fall behind by what these gain.

b_.j is the ridge regression of having item j on having its neighbours in the graph (recsys_ray/scoring/ridge.py).
How strong the ridge is and the weight w are chosen on the validation period (recsys_ray/two_tower/training.py), the
half-life before training (recsys_ray/two_tower/recency.py); weight 0 leaves the towers alone. Lists still come from the
ANN search: to an item that is neither blank nor a neighbour of the history nothing is added, so that the best by inner
product, these neighbours and the blank items hold the exact list (recsys_ray/serving/recommender.py).

Imports neither dgl nor transformers: it is used in a serving replica.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from recsys_ray.core.offsets import spread
from recsys_ray.storage.artifacts import load_arrays, save_arrays

RIDGES = (10.0, 30.0, 100.0, 300.0)  # which a validation chooses from
WEIGHTS = (0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0)  # likewise; of the temperature
HALF_LIVES = (1.0, 4.0, 16.0)  # places; likewise
REACH = 50  # items, which bounds an answer's time; with 16 places a ninth of the weights would lie further back
SMALL = 1e-2
RIVALS = 20  # best items of a user and type, by which a blank item's place is told
NEIGHBOURS = 100  # that an item brings to mind, in each item type: those with the largest coefficients


class Recalled(NamedTuple):
    """What histories bring to mind, ascending by user and gid."""

    user: Int[np.ndarray, "m"]
    gid: Int[np.ndarray, "m"]
    value: Float[np.ndarray, "m ridges"]  # float32: log(1 + max(m, 0) / SMALL)
    items: int  # of the catalogue


@dataclass(frozen=True)
class Memory:
    """Which items each item brings to mind, row = gid; arrays may be memory maps."""

    begin: Int[np.ndarray, "items_plus_1"]
    gid: Int[np.ndarray, "edges"]  # int32, ascending in each row
    coefficient: Float[np.ndarray, "edges ridges"]  # float32: b
    users: Int[np.ndarray, "items"]  # int32: how many had each item

    @staticmethod
    def of_edges(
        src: Int[np.ndarray, "n"],
        dst: Int[np.ndarray, "n"],
        coefficient: Float[np.ndarray, "n ridges"],
        users: Int[np.ndarray, "items"],
        ntype: Int[np.ndarray, "items"],
    ) -> Memory:
        """What src brings to mind, in no order, each pair once. Whoever is in everybody's list would have a row as long
        as the catalogue, and an answer may not take that long: of each row only the largest are kept."""
        group = src.astype(np.int64) * (int(ntype.max(initial=0)) + 1) + ntype[dst]
        order = np.lexsort((dst, -coefficient.sum(1), group))
        group = group[order]
        kept = order[np.arange(len(group)) - np.searchsorted(group, group) < NEIGHBOURS]
        kept = kept[np.lexsort((dst[kept], src[kept]))]
        begin = np.concatenate([[0], np.cumsum(np.bincount(src[kept], minlength=len(users)))])
        return Memory(
            begin.astype(np.int64),
            dst[kept].astype(np.int32),
            coefficient[kept].astype(np.float32),
            users.astype(np.int32),
        )

    def is_blank(self, gids: Int[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
        """Nobody had it."""
        return self.users[gids] == 0

    def at(self, ridge: float) -> Memory:
        """Of one ridge of ``RIDGES`` alone."""
        place = RIDGES.index(ridge)
        return replace(self, coefficient=np.ascontiguousarray(self.coefficient[:, place : place + 1]))

    def extended(
        self,
        src: Int[np.ndarray, "n"],
        dst: Int[np.ndarray, "n"],
        weight: Float[np.ndarray, "n"],
        users: Int[np.ndarray, "items"],
        anew: Int[np.ndarray, "m"],
        ntype: Int[np.ndarray, "items"],
        ridge: float,
    ) -> Memory:
        """With the edges of the items ``anew`` in the place of those that they have here.

        Nothing is solved: b_ij = weight of i -> j / (users of i + ridge), as if the neighbours had no user in common.

        Args:
            src, dst, weight: edges into ``anew`` and out of it, each once.
            users: of the items, whole for ``anew``; of others at least those who made the edges.
            ntype: of all items.
        """
        fresh = np.zeros(len(ntype), bool)
        fresh[anew] = True
        known = np.zeros(len(ntype), np.int64)
        known[: len(self.users)] = self.users
        known[fresh] = 0
        known = np.maximum(known, users)  # what now has an edge is blank no more
        made = weight / (known[src] + ridge)
        old_src = np.repeat(np.arange(len(self.users)), np.diff(self.begin))
        kept = ~fresh[old_src] & ~fresh[self.gid]
        return Memory.of_edges(
            np.concatenate([old_src[kept], src]),
            np.concatenate([self.gid[kept], dst]),
            np.concatenate([self.coefficient[kept], made[:, None]]),
            known,
            ntype,
        )

    @staticmethod
    def nothing(items: int) -> Memory:
        """One that adds nothing to any score."""
        no_edge = np.zeros(0, np.int32)
        begin, users = np.zeros(items + 1, np.int64), np.ones(items, np.int32)
        return Memory(begin, no_edge, np.zeros((0, 1), np.float32), users)

    @staticmethod
    def load(path: Path) -> Memory:
        return Memory(**load_arrays(path))

    def save(self, path: Path) -> None:
        save_arrays(path, vars(self))

    def recall(self, user: Int[np.ndarray, "n"], gid: Int[np.ndarray, "n"], half_life: float) -> Recalled:
        """What histories bring to mind.

        Args:
            user, gid: the events of all histories; of each user in one piece, oldest first.
            half_life: how many places back an item counts half of the last one.

        Returns:
            Every pair with an edge.
        """
        items = len(self.begin) - 1
        user, gid, weight = _latest(user.astype(np.int64), gid.astype(np.int64), items, half_life)
        start, count = self.begin[gid], self.begin[gid + 1] - self.begin[gid]
        place = spread(start, count)
        key = np.repeat(user, count) * items + self.gid[place]
        key, where = np.unique(key, return_inverse=True)
        parts = self.coefficient[place] * np.repeat(weight, count)[:, None]
        total = np.stack([np.bincount(where, part, minlength=len(key)) for part in parts.T], 1)
        value = np.log1p(np.maximum(total, 0) / SMALL).astype(np.float32)
        return Recalled(key // max(items, 1), key % max(items, 1), value, items)


def place_kept(
    score: Float[Tensor, "users n"], before: Float[Tensor, "users k"], after: Float[Tensor, "users k"]
) -> Float[Tensor, "users n"]:
    """What a blank item is given to keep its place: the rise from the others' j-th best score without the memory to
    their j-th best with it, j where the item stands by the towers; linear in between, constant beyond the ends.

    Args:
        score: of blank items, by the towers.
        before, after: the best scores of the others, best first; ``before`` ends in -inf where there are fewer, and
            what ``after`` has there does not count.
    """
    there = torch.isfinite(before)
    size = before.shape[1]
    rise = torch.where(there, after - before, 0).flip(1)
    knots = before.flip(1).contiguous()
    lowest = (size - there.sum(1, keepdim=True)).clamp(max=size - 1)
    above = torch.searchsorted(knots, score.contiguous())
    low, high = torch.maximum(above - 1, lowest), torch.maximum(above.clamp(max=size - 1), lowest)
    left, right = knots.gather(1, low), knots.gather(1, high)
    share = torch.where(right > left, (score - left) / (right - left), 0)
    return torch.lerp(rise.gather(1, low), rise.gather(1, high), share)


def one_row_a_user(row: Int64[Tensor, "m"], value: Float[Tensor, "m"], users: int) -> Float[Tensor, "users most"]:
    """The values of each row, which ascend, as rows of a matrix that -inf fills up."""
    count = torch.bincount(row, minlength=users)
    place = torch.arange(len(row)) - (count.cumsum(0) - count)[row]
    matrix = torch.full((users, int(count.max()) if users else 0), -torch.inf)
    matrix[row, place] = value
    return matrix


def memory_file(two_tower: Path, snapshot: str) -> Path:
    """Where the two-tower stage keeps the memory of a snapshot, for both of its variants and with all ridges."""
    return two_tower / "memory" / f"{snapshot}.safetensors"


def _latest(
    user: np.ndarray, gid: np.ndarray, items: int, half_life: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each user's latest distinct items with their weights a, by the last time that they occur."""
    backwards = (user * items + gid)[::-1]
    last = np.sort(len(user) - 1 - np.unique(backwards, return_index=True)[1])
    user, gid = user[last], gid[last]
    back = np.searchsorted(user, user, side="right") - np.arange(len(user)) - 1
    user, gid, back = (part[back < REACH] for part in (user, gid, back))
    weight = 0.5 ** (back / half_life)
    sums = np.bincount(user, weight, minlength=1) if len(user) else np.ones(1)
    return user, gid, weight / sums[user]
