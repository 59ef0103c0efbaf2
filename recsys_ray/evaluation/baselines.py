"""The recommenders of the comparison. Plain numpy, scipy and torch; building them out of shards is in evaluate.py.

Those that live on a user's history answer users without one with the most popular items.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import scipy.sparse as sp
import torch

from recsys_ray.errors import UserError
from recsys_ray.evaluation.recommenders import Scorer, UserBatch, as_tensor

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class Popularity:
    """Most positive events in the window before the test period (paper A: 90 days)."""

    count: np.ndarray  # [items]
    name: str = "popularity"

    def scorer(self, users: UserBatch) -> Scorer:
        def score(first: int, last: int) -> Tensor:
            return torch.tensor(self.count[first:last], dtype=torch.float32).expand(len(users), -1)

        return score


def _popular_where_empty(score: Scorer, users: UserBatch, popularity: np.ndarray) -> Scorer:
    """``score``, but by popularity for users without history."""
    if not users.empty.any():
        return score
    empty = torch.from_numpy(users.empty)

    def filled(first: int, last: int) -> Tensor:
        scores = score(first, last)
        scores[empty] = torch.tensor(popularity[first:last], dtype=torch.float32)
        return scores

    return filled


@dataclass(frozen=True)
class MeanVectors:
    """Inner product with the mean vector of the user's items: LLM-kNN with text vectors, HGNN with its embeddings."""

    name: str
    vectors: np.ndarray  # float [items, d], unit norm
    popularity: np.ndarray  # [items]
    limit: int  # latest items of a user that count

    def scorer(self, users: UserBatch) -> Scorer:
        row, gid = users.latest_items(self.limit)
        mean = torch.zeros((len(users), self.vectors.shape[1]))
        mean.index_add_(0, torch.from_numpy(row), torch.from_numpy(self.vectors[gid]).float())
        mean = torch.nn.functional.normalize(mean, dim=1)

        def score(first: int, last: int) -> Tensor:
            return mean @ as_tensor(self.vectors[first:last]).float().T

        return _popular_where_empty(score, users, self.popularity)


@runtime_checkable
class TowerScorer(Protocol):
    """What evaluation needs of a trained two-tower model."""

    @property
    def item_vectors(self) -> np.ndarray:
        """float32 [items, d]."""
        ...

    def user_vectors(self, users: UserBatch) -> Float[Tensor, "users d"]:
        """Vectors of users as of the start of the test period."""
        ...


@dataclass(frozen=True)
class Tower:
    """A two-tower model: user vectors times item vectors."""

    name: str
    model: TowerScorer

    def scorer(self, users: UserBatch) -> Scorer:
        with torch.no_grad():
            vectors = torch.as_tensor(self.model.user_vectors(users)).float()
        return lambda first, last: vectors @ as_tensor(self.model.item_vectors[first:last]).float().T


@dataclass(frozen=True)
class ReadyLists:
    """Rankings that exist already, one a user and item type: the demo world's oracle."""

    name: str
    key: np.ndarray  # int64 [lists], uid * types + item type, ascending
    offsets: np.ndarray  # int64 [lists + 1]
    gid: np.ndarray  # int64, best first inside a list
    types: int

    def lists(self, uid: np.ndarray, item_type: np.ndarray) -> np.ndarray:
        """bool: is there a ranking for this user and type?"""
        return np.isin(uid * np.int64(self.types) + item_type, self.key)

    def scorer(self, users: UserBatch) -> Scorer:
        begin = self.offsets[np.searchsorted(self.key, users.uid * self.types)]
        length = self.offsets[np.searchsorted(self.key, (users.uid + 1) * self.types)] - begin
        row = np.repeat(np.arange(len(users)), length)
        place = np.repeat(begin - (np.cumsum(length) - length), length) + np.arange(length.sum())
        gid = self.gid[place]

        def score(first: int, last: int) -> Tensor:
            scores = torch.full((len(users), last - first), -torch.inf)
            here = (gid >= first) & (gid < last)
            # Earlier in the flat array is earlier in the list, and only order counts.
            value = torch.from_numpy((begin[row] - place)[here]).float()
            scores[torch.from_numpy(row[here]), torch.from_numpy(gid[here] - first)] = value
            return scores

        return score


# --- item-kNN ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ItemKnn:
    """Sum over the user's items of their cosine similarity to an item (cosine of co-occurrence over users)."""

    indptr: np.ndarray  # [items + 1]
    indices: np.ndarray  # [similarities]
    similarity: np.ndarray  # float32 [similarities]
    popularity: np.ndarray  # [items]
    limit: int  # latest items of a user that count
    name: str = "item_knn"

    def scorer(self, users: UserBatch) -> Scorer:
        items = len(self.popularity)
        similar = sp.csr_matrix((self.similarity, self.indices, self.indptr), shape=(items, items), copy=False)
        scores = (history_matrix(users, items, self.limit) @ similar).tocsc()
        # Most items share no user with the history and score 0: popularity orders these, below all others.
        small = 0.5 * self.similarity.min(initial=1.0) / (1.0 + self.popularity.max(initial=0))

        def score(first: int, last: int) -> Tensor:
            dense = scores[:, first:last].toarray().astype(np.float32)
            return torch.from_numpy(dense + (small * self.popularity[first:last]).astype(np.float32))

        return score


def history_matrix(users: UserBatch, items: int, limit: int) -> sp.csr_matrix:
    """float32 [users, items]: 1 for the latest ``limit`` items of each user."""
    row, gid = users.latest_items(limit)
    return sp.csr_matrix((np.ones(len(row), dtype=np.float32), (row, gid)), shape=(len(users), items))


def block_edges(items: int, blocks: int) -> np.ndarray:
    """int64 [blocks + 1]: ranges of rows."""
    return np.linspace(0, items, blocks + 1).astype(np.int64)


def count_pairs(histories: sp.csr_matrix, blocks: int) -> list[sp.csr_matrix]:
    """Users that have both items, for each pair of items; rows are cut into ``blocks`` ranges, each merged alone."""
    edges = block_edges(histories.shape[1], blocks)
    columns = histories.tocsc()
    return [(columns[:, a:b].T @ histories).tocsr() for a, b in pairwise(edges)]


def nearest_items(
    pairs: sp.csr_matrix, first_row: int, users_per_item: np.ndarray, item_type: np.ndarray, limit: int
) -> sp.csr_matrix:
    """Cosine similarities out of the counts of pairs: the ``limit`` best of each row and type of neighbour.

    Args:
        pairs: [rows, items], counts over all users; row r is item ``first_row + r``.
        users_per_item: int [items], users that have the item.
        item_type: int [items].
    """
    found = pairs.tocoo()
    other = found.row + first_row != found.col
    row, column, count = found.row[other].astype(np.int64), found.col[other], found.data[other]
    norm = np.sqrt(users_per_item[row + first_row].astype(np.float64) * users_per_item[column])
    similarity = (count / norm).astype(np.float32)
    group = row * (int(item_type.max(initial=0)) + 1) + item_type[column]
    order = np.lexsort((column, -similarity, group))
    _, begin, length = np.unique(group[order], return_index=True, return_counts=True)
    kept = order[np.arange(len(order)) - np.repeat(begin, length) < limit]
    return sp.csr_matrix((similarity[kept], (row[kept], column[kept])), shape=pairs.shape)


# --- iALS -------------------------------------------------------------------------------------------------------------


@dataclass
class Ials:
    """Implicit ALS (Hu et al. 2008) by the ``implicit`` package; a user's factors are solved for from the history."""

    item_factors: np.ndarray  # float32 [items, factors]
    regularization: float
    alpha: float
    popularity: np.ndarray  # [items]
    limit: int  # latest items of a user that count
    name: str = "ials"
    _model: Any = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": None}

    def scorer(self, users: UserBatch) -> Scorer:
        if self._model is None:
            self._model = _als(self.item_factors.shape[1], self.regularization, self.alpha, threads=1)
            self._model.item_factors = np.array(self.item_factors)  # its solver refuses read-only memory
        liked = history_matrix(users, len(self.popularity), self.limit)
        factors = torch.from_numpy(self._model.recalculate_user(np.arange(len(users)), liked))

        def score(first: int, last: int) -> Tensor:
            return factors @ as_tensor(self.item_factors[first:last]).T

        return _popular_where_empty(score, users, self.popularity)


def fit_ials(
    histories: sp.csr_matrix, factors: int, regularization: float, alpha: float, seed: int, iterations: int = 15
) -> np.ndarray:
    """float32 [items, factors] from histories [users, items]."""
    model = _als(factors, regularization, alpha, threads=1, iterations=iterations, random_state=seed)
    model.fit(histories, show_progress=False)
    return np.nan_to_num(np.asarray(model.item_factors))


def _als(factors: int, regularization: float, alpha: float, threads: int, **options: Any) -> Any:
    try:
        from implicit.cpu.als import AlternatingLeastSquares
    except ImportError as error:
        raise UserError("evaluate.ials needs the extra: pip install 'recsys-ray[baselines]'") from error
    return AlternatingLeastSquares(
        factors=factors, regularization=regularization, alpha=alpha, num_threads=threads, **options
    )
