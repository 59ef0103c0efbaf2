"""Implicit ALS (Hu, Koren and Volinsky, ICDM 2008), from the ``implicit`` package."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from recsys_ray.baselines.histories import (
    HistoryRule,
    empty_rows,
    favour_popular,
    history_rule,
    history_space,
    item_ranges,
    join_parts,
    training_matrix,
    training_space,
    trend_space,
)
from recsys_ray.baselines.interface import Baseline, Choice, KnownData, Params, Real, Space, Watch, Whole
from recsys_ray.config import Config
from recsys_ray.evaluation.ranking import Scorer, UserBatch, as_tensor, popular_where

_ITERATIONS = 15


@dataclass(frozen=True)
class Part:
    """Factors of a range of items that were fitted together."""

    first: int
    last: int
    factors: np.ndarray  # float32 [last - first, factors]


@dataclass
class Ials:
    """One part of all types, or one a type. A user's factors are solved for from the history, so that users who were
    not fitted are answered too."""

    parts: list[Part]
    regularization: float
    alpha: float
    popularity: np.ndarray  # [items]
    power: float  # of popularity
    rule: HistoryRule
    name: str = "ials"
    _solvers: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_solvers": {}}

    def scorer(self, users: UserBatch) -> Scorer:
        histories = self.rule.matrix(users, len(self.popularity))
        parts = [(part.first, part.last, self._answer(k, part, histories)) for k, part in enumerate(self.parts)]
        return join_parts(parts, len(users))

    def _answer(self, k: int, part: Part, histories: sp.csr_matrix) -> Scorer:
        """Scores of one part's items."""
        if k not in self._solvers:
            self._solvers[k] = _als(part.factors.shape[1], self.regularization, self.alpha, threads=1)
            self._solvers[k].item_factors = np.array(part.factors)  # its solver refuses read-only memory
        mine = histories[:, part.first : part.last].tocsr()
        factors = torch.from_numpy(self._solvers[k].recalculate_user(np.arange(mine.shape[0]), mine))

        def score(first: int, last: int) -> Tensor:
            return factors @ as_tensor(part.factors[first - part.first : last - part.first]).T

        favoured = favour_popular(score, self.popularity, self.power)
        return popular_where(empty_rows(mine), favoured, self.popularity)


def fit_factors(
    histories: sp.csr_matrix, factors: int, regularization: float, alpha: float, seed: int, threads: int = 1
) -> np.ndarray:
    """float32 [items, factors] from weights [users, items]."""
    from threadpoolctl import threadpool_limits  # comes with implicit, which wants BLAS on one thread beside its own

    model = _als(factors, regularization, alpha, threads, iterations=_ITERATIONS, random_state=seed)
    with threadpool_limits(1, "blas"):
        model.fit(histories, show_progress=False)
    return np.nan_to_num(np.asarray(model.item_factors))


def _als(factors: int, regularization: float, alpha: float, threads: int, **options: Any) -> Any:
    from implicit.cpu.als import AlternatingLeastSquares

    return AlternatingLeastSquares(
        factors=factors, regularization=regularization, alpha=alpha, num_threads=threads, **options
    )


def _space(config: Config) -> Space:
    return {
        "joint": Choice(True, (True, False)),
        "factors": Whole(64, 16, 256, log=True),
        "regularization": Real(1.0, 0.001, 100.0, log=True),
        "alpha": Real(5.0, 0.5, 100.0, log=True),
        **training_space(config),
        **history_space(config),
        **trend_space(config, 0.0),
    }


def _fit(data: KnownData, params: Params, seed: int, threads: int, watch: Watch | None = None) -> Ials:
    histories = training_matrix(data, params)
    parts = []
    for first, last in item_ranges(data.catalogue, params["joint"]):
        mine = histories[:, first:last].tocsr()
        mine = mine[~empty_rows(mine)]
        tuned = (params["factors"], params["regularization"], params["alpha"])
        factors = fit_factors(mine, *tuned, seed, threads) if mine.nnz else np.zeros((last - first, 1), np.float32)
        parts.append(Part(first, last, factors))
    popularity, power = data.popularity(params["popular_days"]), params["popular_power"]
    return Ials(parts, params["regularization"], params["alpha"], popularity, power, history_rule(data, params))


IALS = Baseline(
    name="ials",
    note="Implicit ALS, tuned.",
    space=_space,
    fit=_fit,
    seeded=True,
    module="implicit",
    extra="baselines",
)
