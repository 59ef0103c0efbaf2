"""Most popular items, the same for everyone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recsys_ray.baselines.histories import popular_space
from recsys_ray.baselines.interface import Baseline, KnownData, Params, Watch
from recsys_ray.evaluation.ranking import Scorer, UserBatch


@dataclass(frozen=True)
class Popularity:
    """Most positive events in the window before the test period (paper A: 90 days)."""

    count: np.ndarray  # [items]
    name: str = "popularity"

    def scorer(self, users: UserBatch) -> Scorer:
        def score(first: int, last: int) -> Tensor:
            return torch.tensor(self.count[first:last], dtype=torch.float32).expand(len(users), -1)

        return score


def _fit(data: KnownData, params: Params, seed: int, threads: int, watch: Watch | None = None) -> Popularity:
    return Popularity(data.popularity(params["popular_days"]))


POPULARITY = Baseline(
    name="popularity",
    note="Most positive events in a window before the test period; the window's length is tuned.",
    space=popular_space,
    fit=_fit,
)
