"""Ranking metrics, vectorised over queries, and their bootstrap intervals. No Ray in here.

A query has a ranking of at most 100 items and a set of relevant items, its truths. A ranking is stored as the ranks of
its truths: flat arrays of (query, rank) pairs, ranks counted from 0. All metrics follow from them.

Definitions agree with ranx (binary relevance); tests compare them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

CUTOFF = 10  # of HR and NDCG
DEPTH = 100  # of MRR and coverage: length of a ranking

_DISCOUNT = 1.0 / np.log2(np.arange(CUTOFF) + 2.0)
_IDEAL = np.concatenate([[0.0], np.cumsum(_DISCOUNT)])


@dataclass(frozen=True)
class QueryScores:
    """One value per query, shape [queries] each."""

    hit: np.ndarray  # bool: a truth among the first CUTOFF
    ndcg: np.ndarray  # float64 in [0, 1]
    reciprocal_rank: np.ndarray  # float64 in [0, 1]: 1 / (place of the first truth among DEPTH), 0 without one

    def select(self, queries: np.ndarray) -> QueryScores:
        """The same for some queries (indices or a mask)."""
        return QueryScores(self.hit[queries], self.ndcg[queries], self.reciprocal_rank[queries])


def score_queries(truths: np.ndarray, hit_query: np.ndarray, hit_rank: np.ndarray) -> QueryScores:
    """Metrics of every query.

    Args:
        truths: int [queries], how many relevant items each query has.
        hit_query: int [hits], the query of each relevant item that was ranked.
        hit_rank: int [hits], its rank, from 0, below ``DEPTH``; no two hits of a query share one.
    """
    queries = len(truths)
    near = hit_rank < CUTOFF
    gain = np.bincount(hit_query[near], weights=_DISCOUNT[hit_rank[near]], minlength=queries)
    ideal = _IDEAL[np.minimum(truths, CUTOFF)]
    first = np.full(queries, DEPTH, dtype=np.int64)
    np.minimum.at(first, hit_query, hit_rank)
    return QueryScores(
        hit=first < CUTOFF,
        ndcg=np.divide(gain, ideal, out=np.zeros(queries), where=ideal > 0),
        reciprocal_rank=np.where(first < DEPTH, 1.0 / (first + 1.0), 0.0),
    )


def find_hits(
    ranked: np.ndarray, truth_query: np.ndarray, truth_item: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the truths of a batch stand in its rankings.

    Args:
        ranked: int64 [queries, places], items best first; -1 where a ranking is shorter.
        truth_query: int64 [truths], row of ``ranked``.
        truth_item: int64 [truths], the relevant item.

    Returns:
        For each hit, ordered by query and rank: the query, the rank, and its number among the truths.
    """
    span = int(max(ranked.max(initial=0), truth_item.max(initial=0))) + 1
    keys = truth_query.astype(np.int64) * span + truth_item
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    wanted = np.arange(len(ranked))[:, None] * np.int64(span) + ranked
    place = np.minimum(np.searchsorted(keys, wanted), max(len(keys) - 1, 0))
    found = (ranked >= 0) & (keys[place] == wanted) if len(keys) else np.zeros(ranked.shape, dtype=bool)
    query, rank = np.nonzero(found)
    return query, rank, order[place[found]]


def bootstrap_interval(
    values: np.ndarray, users: np.ndarray, resamples: int, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of small whole numbers (hits, differences of hits) over queries, users
    resampled with all their queries.

    A user counts only through (number of queries, sum of values), and few such pairs exist: one user has at most
    one query a type. So a resample of users is one multinomial draw over the pairs that occur. That is the exact
    bootstrap at a cost that does not grow with the number of users.

    Args:
        values: bool or integers [queries].
        users: int [queries], the user of each query.
    """
    if not len(values):
        return 0.0, 0.0
    _, user = np.unique(users, return_inverse=True)
    queries = np.bincount(user)
    hits = np.rint(np.bincount(user, weights=np.asarray(values, dtype=np.float64))).astype(np.int64)
    patterns, count = np.unique(np.stack([queries, hits]), axis=1, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(queries), count / count.sum(), size=resamples)
    means = (drawn @ patterns[1]) / (drawn @ patterns[0])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_interval(values: np.ndarray, users: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean over queries of values in [0, 1], where a user's queries depend on each other.

    The normal interval of a ratio of sums over users (linearised, as in cluster sampling): no resampling, so that it
    costs one pass for values of any kind.

    Args:
        values: float [queries].
        users: int [queries], the user of each query.
    """
    if not len(values):
        return 0.0, 0.0
    _, user = np.unique(users, return_inverse=True)
    queries = np.bincount(user)
    mean = float(values.mean())
    residual = np.bincount(user, weights=values) - mean * queries
    correction = len(queries) / max(len(queries) - 1, 1)
    half = 1.96 * float(np.sqrt(correction * (residual**2).sum())) / len(values)
    return max(mean - half, 0.0), min(mean + half, 1.0)


def pooled_interval(
    values: np.ndarray, users: np.ndarray, resamples: int, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """Interval of a mean over queries and training seeds that covers the draw of both users and seeds.

    Users: the bootstrap of the seeds' mean. Seeds: Student's t over the seeds' own means; few seeds make it wide. The
    two limits' distances from the mean are added in squares (the MOVER of Zou and Donner, Statistics in Medicine 2008),
    which keeps the bootstrap's asymmetry. Variation shared by users and seeds is in both parts, so the interval is
    rather too wide than too narrow. With one seed it is the bootstrap over users and does not cover seeds.

    Args:
        values: bool or integers [seeds, queries]: the same queries in every row.
        users: int [queries].
    """
    seeds = len(values)
    total = values.astype(np.int64).sum(axis=0)
    low, high = (end / seeds for end in bootstrap_interval(total, users, resamples, seed, level))
    if seeds == 1 or not values.size:
        return low, high
    return widen(values.mean(axis=1), low, high, level)


def widen(means: np.ndarray, low: float, high: float, level: float = 0.95) -> tuple[float, float]:
    """An interval over users, made to cover the draw of training seeds too (:func:`pooled_interval`).

    Args:
        means: float [seeds], each seed's own mean.
        low, high: the interval over users of the mean of these.
    """
    seeds, mean = len(means), float(means.mean())
    spread = 0.0
    if seeds > 1:
        spread = float(means.std(ddof=1)) / np.sqrt(seeds) * float(stdtrit(seeds - 1, (1 + level) / 2))
    return mean - float(np.hypot(max(mean - low, 0.0), spread)), mean + float(np.hypot(max(high - mean, 0.0), spread))
