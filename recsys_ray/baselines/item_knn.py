"""Item-kNN: scores items by a tuned co-occurrence similarity to the user's history.

    s(i, j) = c_ij / (c_ii^own * c_jj^other + shrink)
    score(u, j) = (1 + p_j)^popular_power * sum over i in history of u of w_ui * s(i, j)

``c_ij`` sums, over the users that have both items, the product of the items' weights in the user's history, divided by
the user's number of items to the power ``user_norm``. own = other = 1/2, shrink = 0 is the cosine; a smaller ``other``
favours popular items (Deshpande and Karypis, TOIS 2004; Sarwar et al., WWW 2001). ``p_j`` is how often j was chosen
recently: on a split by time, current popularity matters as much as the similarity, which reflects past popularity.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from recsys_ray.baselines.histories import (
    HistoryRule,
    history_rule,
    history_space,
    tie_break,
    training_matrix,
    training_space,
    trend_space,
)
from recsys_ray.baselines.interface import Baseline, Choice, KnownData, Params, Real, Space, Watch, Whole
from recsys_ray.config import Config
from recsys_ray.evaluation.ranking import Scorer, UserBatch

_ROWS = 4_096  # items whose pairs are in memory at once


@dataclass(frozen=True)
class ItemKnn:
    """Weighted sum over the user's items of their similarity to an item; popularity orders items of score 0."""

    indptr: np.ndarray  # [items + 1]
    indices: np.ndarray  # [similarities]
    similarity: np.ndarray  # float32 [similarities]
    popularity: np.ndarray  # [items]
    power: float  # of popularity
    rule: HistoryRule
    name: str = "item_knn"

    def scorer(self, users: UserBatch) -> Scorer:
        items = len(self.popularity)
        similar = sp.csr_matrix((self.similarity, self.indices, self.indptr), shape=(items, items), copy=False)
        scores = (self.rule.matrix(users, items) @ similar).tocsc()
        # Most items share no user with the history and score 0: popularity orders these, below all others.
        small = tie_break(self.popularity, below=0.5 * float(scores.data.min(initial=1.0)))

        factor = ((1.0 + self.popularity) ** self.power).astype(np.float32)  # 1 at least

        def score(first: int, last: int) -> Tensor:
            dense = scores[:, first:last].toarray().astype(np.float32)
            return torch.from_numpy(dense * factor[first:last] + small[first:last])

        return score


def nearest_items(
    histories: sp.csr_matrix,
    item_type: np.ndarray,
    neighbours: int,
    own: float = 0.5,
    other: float = 0.5,
    shrink: float = 0.0,
    joint: bool = True,
) -> sp.csr_matrix:
    """Similarities [items, items]: of each row, the ``neighbours`` largest for each type of neighbour.

    Args:
        histories: float32 [users, items], weights.
        item_type: int [items].
        joint: items of other types are neighbours too.
    """
    columns = histories.tocsc()
    items = histories.shape[1]
    size = np.asarray(columns.power(2).sum(axis=0), dtype=np.float64).ravel()  # c_ii
    own_size, other_size = np.maximum(size, 1e-9) ** own, np.maximum(size, 1e-9) ** other
    parts = []
    for start in range(0, items, _ROWS):
        stop = min(start + _ROWS, items)
        found = (columns[:, start:stop].T @ histories).tocoo()
        row, column = found.row, found.col
        kept = row + start != column
        if not joint:
            kept &= item_type[row + start] == item_type[column]
        row, column, count = row[kept], column[kept], found.data[kept]
        similarity = (count / (own_size[row + start] * other_size[column] + shrink)).astype(np.float32)
        best = _largest(row, item_type[column], similarity, column, neighbours)
        shape = (stop - start, items)
        parts.append(sp.csr_matrix((similarity[best], (row[best], column[best])), shape=shape))
    similar = sp.vstack(parts, format="csr")
    similar.sort_indices()
    return similar


def _largest(row: np.ndarray, kind: np.ndarray, value: np.ndarray, column: np.ndarray, limit: int) -> np.ndarray:
    """Places of the ``limit`` largest values of each (row, kind); equal ones by column."""
    group = row.astype(np.int64) * (int(kind.max(initial=0)) + 1) + kind
    crowded = np.bincount(group)[group] > limit if len(group) else np.zeros(0, bool)
    few, many = np.flatnonzero(~crowded), np.flatnonzero(crowded)  # most groups are small: only the others are sorted
    order = many[np.lexsort((column[many], -value[many], group[many]))]
    _, begin, length = np.unique(group[order], return_index=True, return_counts=True)
    return np.concatenate([few, order[np.arange(len(order)) - np.repeat(begin, length) < limit]])


def _space(config: Config) -> Space:
    return {
        "joint": Choice(True, (True, False)),
        "neighbours": Whole(500, 20, 1000, log=True),
        "shrink": Real(1.0, 0.1, 100.0, log=True),
        "own": Real(0.5, 0.0, 1.0),
        "other": Real(0.3, 0.0, 1.0),
        "user_norm": Real(0.5, 0.0, 1.0),
        **training_space(config),
        **history_space(config),
        **trend_space(config, 0.5),
    }


def _fit(data: KnownData, params: Params, seed: int, threads: int, watch: Watch | None = None) -> ItemKnn:
    histories = training_matrix(data, params)
    length = np.maximum(np.diff(histories.indptr), 1)
    histories = sp.diags((length ** (-0.5 * params["user_norm"])).astype(np.float32)) @ histories
    item_type = data.catalogue.type_of(np.arange(data.catalogue.items))
    tuned = {name: params[name] for name in ("neighbours", "own", "other", "shrink", "joint")}
    similar = nearest_items(histories.tocsr(), item_type, **tuned)
    popularity = data.popularity(params["popular_days"])
    return ItemKnn(
        similar.indptr, similar.indices, similar.data, popularity, params["popular_power"], history_rule(data, params)
    )


ITEM_KNN = Baseline(
    name="item_knn",
    note="Co-occurrence similarity, summed over the user's items; similarity and history are tuned.",
    space=_space,
    fit=_fit,
)
