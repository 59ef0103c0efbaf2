"""The two dials that order a list anew: popularity and diversity. Each works on the candidates of one answer."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from recsys_ray.serving.requests import MAX_K

_POOL, _SMALLEST_POOL = 5, 100  # candidates: a multiple of the list's length, at least this many


def pool_size(wanted: int) -> int:
    """How many candidates are needed to choose so many items from."""
    return min(max(_POOL * wanted, _SMALLEST_POOL), MAX_K)


def with_popularity(values: Float[np.ndarray, "n"], users: Int[np.ndarray, "n"], dial: float) -> Float[np.ndarray, "n"]:
    """Values that ``dial``, -1 to 1, moves by the popularity among the candidates: at 1, one standard deviation of the
    logarithm of the users counts as one of the values."""
    known = np.log1p(users)
    return values + dial * values.std() * (known - known.mean()) / max(float(known.std()), 1e-9)


def diverse(
    values: Float[np.ndarray, "n"], vectors: Float[np.ndarray, "n d"], share: float, k: int
) -> Int[np.ndarray, "m"]:
    """Places of the best ``k`` by maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998): each is the one
    with the most of (1 - share) value - share (likeness to the most alike above it).

    Args:
        vectors: their products are the likeness.
    """
    span = float(values.max() - values.min())
    values = (values - values.min()) / (span or 1.0)
    likeness, open_ = np.zeros(len(values)), np.ones(len(values), bool)
    order: list[int] = []
    while len(order) < min(k, len(values)):
        gain = np.where(open_, (1 - share) * values - share * likeness, -np.inf)
        order.append(int(gain.argmax()))
        open_[order[-1]] = False
        likeness = np.maximum(likeness, vectors @ vectors[order[-1]])
    return np.array(order)
