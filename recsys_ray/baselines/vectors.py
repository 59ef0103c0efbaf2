"""Nearest items to the mean vector of a user's history: LLM-kNN with text vectors, HGNN alone with HGNN embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recsys_ray.baselines.histories import HistoryRule, history_rule, history_space
from recsys_ray.baselines.interface import Baseline, KnownData, Params, Watch
from recsys_ray.evaluation.ranking import Scorer, UserBatch, as_tensor, popular_where


@dataclass(frozen=True)
class MeanVectors:
    """Inner product with the weighted mean vector of the user's items."""

    name: str
    vectors: np.ndarray  # float [items, d], unit norm
    popularity: np.ndarray  # [items]
    rule: HistoryRule

    def scorer(self, users: UserBatch) -> Scorer:
        row, event, weight = self.rule.entries(users)
        mean = torch.zeros((len(users), self.vectors.shape[1]))
        vectors = torch.from_numpy(self.vectors[users.gid[event]]).float() * torch.from_numpy(weight)[:, None]
        mean.index_add_(0, torch.from_numpy(row), vectors)
        mean = torch.nn.functional.normalize(mean, dim=1)
        empty = np.bincount(row, minlength=len(users)) == 0

        def score(first: int, last: int) -> Tensor:
            return mean @ as_tensor(self.vectors[first:last]).float().T

        return popular_where(empty, score, self.popularity)


def _fit_text(data: KnownData, params: Params, seed: int, threads: int, watch: Watch | None = None) -> MeanVectors:
    popularity = data.popularity(data.config.graph.window_days)
    return MeanVectors("llm_knn", data.text(), popularity, history_rule(data, params))


def _fit_hgnn(data: KnownData, params: Params, seed: int, threads: int, watch: Watch | None = None) -> MeanVectors:
    popularity = data.popularity(data.config.graph.window_days)
    return MeanVectors("hgnn", data.embeddings(), popularity, history_rule(data, params))


LLM_KNN = Baseline(
    name="llm_knn",
    note="Nearest items to the mean text vector of the user's items; length and weights of the history are tuned.",
    space=history_space,
    fit=_fit_text,
    inputs=("featurize",),
)
HGNN = Baseline(
    name="hgnn",
    note="Nearest items to the mean HGNN embedding of the user's items; the history is tuned as for LLM-kNN.",
    space=history_space,
    fit=_fit_hgnn,
    inputs=("hgnn",),
)
