"""The places of what users chose later, by scores and by what a memory adds: for choices on the validation queries.

Ranking is over the whole item type, without the items of the history.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from recsys_ray.scoring.memory import RIVALS, Recalled, one_row_a_user, place_kept
from recsys_ray.two_tower.rows import Examples, histories_of

DEPTH = 100  # places that gain something when something is chosen by validation
_CHUNK = 512  # queries at once


@dataclass(frozen=True)
class Asked:
    """Some queries about one item type, whose gids are ``first`` and the following."""

    rows: Int[np.ndarray, "B"]  # of the queries
    first: int
    count: int  # items of the type
    target: Int64[Tensor, "B"]  # place in the type
    user: Int[np.ndarray, "events"]  # place in ``rows`` of each event of the histories
    history: Int[np.ndarray, "events"]  # gids of any type

    @property
    def gids(self) -> Int[np.ndarray, "N"]:
        """Of the type."""
        return np.arange(self.first, self.first + self.count)

    def without_history(self, scores: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """-inf for what the user has: nothing of it is recommended. Overwrites ``scores``."""
        inside = (self.history >= self.first) & (self.history < self.first + self.count)
        scores[self.user[inside], self.history[inside] - self.first] = -torch.inf
        return scores


def asked_by_type(queries: Examples, rows: Int[np.ndarray, "n"], ntype: Int[np.ndarray, "items"]) -> Iterator[Asked]:
    """The queries ``rows``, some at a time, users in order."""
    kinds = ntype[queries["target"][rows]]
    for kind in np.unique(kinds):
        mine = rows[kinds == kind]
        mine = mine[np.argsort(queries["uid"][mine], kind="stable")]
        first, last = np.searchsorted(ntype, [kind, kind + 1])
        for chunk in np.array_split(mine, -(-len(mine) // _CHUNK)):
            history, _, offsets = histories_of(queries, chunk)
            user = np.repeat(np.arange(len(chunk)), np.diff(offsets))
            target = torch.from_numpy(queries["target"][chunk]).long() - int(first)
            yield Asked(chunk, int(first), int(last - first), target, user, history)


def gain_of(places: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """NDCG@100 of lists with one truth, by its place from 0."""
    return ((places < DEPTH) / torch.log2(places + 2)).double()


def ranks_with_memory(
    scores: Float[Tensor, "B N"],
    target: Int64[Tensor, "B"],
    recalled: Recalled,
    first: int,
    blank: Bool[Tensor, "N"],
    weights: Sequence[float],
) -> Float[Tensor, "B weights ridges"]:
    """The target's place, from 0, with each weight of the memory; look-alikes of a target stand before it by half: they
    do not all rank first. Places from ``DEPTH`` on are counted up to some number above it.

    Overwrites ``scores``. Of the items that no edge raises the best ``2 * DEPTH`` are enough to know.

    Args:
        scores: of the towers; column 0 is the item with gid ``first``.
        target: columns.
        blank: columns of the items that nobody had.
    """
    everyone, count = torch.arange(len(target)), scores.shape[1]
    here = (recalled.gid >= first) & (recalled.gid < first + count)
    row, column, value = (
        torch.from_numpy(part[here]) for part in (recalled.user, recalled.gid - first, recalled.value)
    )
    best = scores.topk(min(RIVALS, count), dim=1)
    before = best.values.masked_fill(blank[best.indices], -torch.inf).sort(1, descending=True).values
    own, raised, is_target = scores[everyone, target], scores[row, column], column == target[row]
    scores[row, column] = -torch.inf
    not_raised = scores.gather(1, best.indices).masked_fill(blank[best.indices], -torch.inf)
    scores[everyone, target] = -torch.inf
    fresh = scores[:, blank].topk(min(2 * DEPTH, int(blank.sum())), dim=1).values
    scores[:, blank] = -torch.inf
    rest = scores.topk(min(2 * DEPTH, count), dim=1).values
    places = torch.zeros(len(target), len(weights), value.shape[1])
    for place, weight in enumerate(weights):
        for ridge in range(value.shape[1]):
            with_it = raised + weight * value[:, ridge]
            others = torch.cat([not_raised, one_row_a_user(row, with_it, len(target))], dim=1)
            after = others.topk(before.shape[1], dim=1).values
            mine = own + place_kept(own[:, None], before, after).squeeze(1) * blank[target]
            mine = mine.index_put((row[is_target],), with_it[is_target])
            ahead = _before(rest, mine) + _before(fresh + place_kept(fresh, before, after), mine)
            rival, limit = with_it[~is_target], mine[row[~is_target]]
            ahead = ahead.index_add(0, row[~is_target], (rival > limit).float() + (rival == limit) / 2)
            places[:, place, ridge] = ahead
    return places


def _before(scores: Float[Tensor, "B k"], limit: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
    return (scores > limit[:, None]).sum(1) + (scores == limit[:, None]).sum(1) / 2
