"""EASE^R (Steck, WWW 2019): the linear item-to-item model without self-similarity, in closed form.

P = (X^T X + l2 I)^-1,    B_ij = -P_ij / P_jj (i != j), B_ii = 0,    score(u, .) = x_u B
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg.lapack as lapack
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
    tie_break,
    training_matrix,
    training_space,
    trend_space,
)
from recsys_ray.baselines.interface import Baseline, Choice, KnownData, Params, Real, Space, Watch
from recsys_ray.config import Config
from recsys_ray.evaluation.ranking import Scorer, UserBatch, popular_where

_ROWS = 2_048  # rows of a dense matrix that are worked on at once
_TIE = 1e-6  # popularity stays below any score that means something


@dataclass(frozen=True)
class Block:
    """The model of some items among themselves."""

    gid: np.ndarray  # int64 [n], ascending
    weights: np.ndarray  # float16 [n, n], B: half the memory, and the order of scores does not need more


@dataclass(frozen=True)
class Ease:
    """One block of all types, or one a type; items in no block score 0 and are ordered by popularity."""

    blocks: list[Block]
    popularity: np.ndarray  # [items]
    power: float  # of popularity
    rule: HistoryRule
    name: str = "ease"

    def scorer(self, users: UserBatch) -> Scorer:
        histories = self.rule.matrix(users, len(self.popularity)).tocsc()
        small = tie_break(self.popularity, below=_TIE)

        def score(first: int, last: int) -> Tensor:
            scores = np.tile(small[first:last], (len(users), 1))
            for block in self.blocks:
                begin, end = (int(k) for k in np.searchsorted(block.gid, (first, last)))
                if begin < end:
                    scores[:, block.gid[begin:end] - first] += _times(histories, block, begin, end)
            return torch.from_numpy(scores)

        favoured = favour_popular(score, self.popularity, self.power)
        return popular_where(empty_rows(histories.tocsr()), favoured, self.popularity)


def _times(histories: sp.csc_matrix, block: Block, begin: int, end: int) -> np.ndarray:
    """Histories times the columns ``begin:end`` of a block; float32 [users, end - begin]. Only rows of items that
    someone has are read."""
    mine = histories[:, block.gid]
    used = np.flatnonzero(np.diff(mine.indptr))
    return np.asarray(mine[:, used] @ block.weights[used, begin:end].astype(np.float32))


def solve(histories: sp.csr_matrix, l2: float) -> np.ndarray:
    """B, float16 [items, items]. Peak memory: items^2 x 4 bytes, and half of it again for the result.

    Args:
        histories: float32 [users, items], weights.
    """
    items = histories.shape[1]
    columns = histories.tocsc()
    # Column-major and overwritten, since LAPACK would copy anything else.
    gram = np.zeros((items, items), dtype=np.float32, order="F")
    for start in range(0, items, _ROWS):
        stop = min(start + _ROWS, items)
        gram[:, start:stop] = (histories.T @ columns[:, start:stop]).toarray()
    gram[np.arange(items), np.arange(items)] += np.float32(l2)
    factor, failed = lapack.spotrf(gram, lower=1, clean=0, overwrite_a=1)
    inverse, failed_too = lapack.spotri(factor, lower=1, overwrite_c=1)
    assert not failed and not failed_too  # l2 > 0 makes it positive definite
    diagonal = inverse.diagonal().copy()
    weights = np.empty((items, items), dtype=np.float16)
    for start in range(0, items, _ROWS):  # only the lower triangle was computed
        stop = min(start + _ROWS, items)
        weights[start:, start:stop] = inverse[start:, start:stop] / -diagonal[start:stop]
        weights[start:stop, start:] = inverse[start:, start:stop].T / -diagonal[start:]
        square = np.tril(inverse[start:stop, start:stop])
        weights[start:stop, start:stop] = (square + np.tril(square, -1).T) / -diagonal[start:stop]
    weights[np.arange(items), np.arange(items)] = 0
    return weights


def _space(config: Config) -> Space:
    return {
        "joint": Choice(False, (False, True)),
        "l2": Real(100.0, 1.0, 5000.0, log=True),
        **training_space(config),
        **history_space(config),
        **trend_space(config, 0.0),
    }


def _fit(data: KnownData, params: Params, seed: int, threads: int, watch: Watch | None = None) -> Ease:
    histories = training_matrix(data, params)
    blocks = []
    for first, last in item_ranges(data.catalogue, params["joint"]):
        gid = _most_touched(histories, first, last, data.config.evaluate.ease_items)
        if len(gid):
            blocks.append(Block(gid, solve(histories[:, gid].tocsr(), params["l2"])))
    popularity = data.popularity(params["popular_days"])
    return Ease(blocks, popularity, params["popular_power"], history_rule(data, params))


def _most_touched(histories: sp.csr_matrix, first: int, last: int, limit: int) -> np.ndarray:
    """int64: gids of the range with interactions, at most the ``limit`` with the most; ascending."""
    users = np.bincount(histories.indices, minlength=histories.shape[1])[first:last]
    touched = np.flatnonzero(users)
    return np.sort(first + touched[np.argsort(-users[touched], kind="stable")[:limit]])


EASE = Baseline(
    name="ease",
    note="EASE^R, a linear item-to-item model in closed form, over at most evaluate.ease_items of a type's (joint: of "
    "all) most touched items; tuned.",
    space=_space,
    fit=_fit,
)
