"""How baselines cut and weight a user's history, and popularity for users without one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from recsys_ray.baselines.interface import Choice, KnownData, Params, Real, Space, Whole, values_with
from recsys_ray.config import Config
from recsys_ray.core.clock import DAY
from recsys_ray.data.tables import Catalogue
from recsys_ray.evaluation.ranking import Scorer, UserBatch

_POPULAR_DAYS = (7, 30, 90, 365, None)
_TIE = 1e-6  # stays below any score that means something


@dataclass(frozen=True)
class HistoryRule:
    """The latest ``limit`` items of a user, each once, and what each weighs."""

    limit: int
    half_life: float | None = None  # in places, counted back from the latest item; None: all weigh the same
    weak: float = 1.0  # weight of an item with weak signals only
    positive: np.ndarray | None = None  # bool [event names]; needed where ``weak`` is not 1

    def entries(self, users: UserBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(row, event, weight): of each kept item, the user's place in the batch, the place of its last event in the
        batch's columns, and its weight (float32). By row, then time; items of weight 0 are left out."""
        rows = users.rows
        pair = rows * (int(users.gid.max(initial=0)) + 1) + users.gid
        last = np.sort(len(pair) - 1 - np.unique(pair[::-1], return_index=True)[1])
        weight = np.ones(len(last), np.float32)
        if self.weak != 1.0:
            assert self.positive is not None
            chosen = np.unique(pair[self.positive[users.event]])
            weight[~np.isin(pair[last], chosen)] = self.weak
            last, weight = last[weight > 0], weight[weight > 0]
        row = rows[last]
        back = np.searchsorted(row, np.arange(len(users)), side="right")[row] - np.arange(len(row)) - 1
        if self.half_life is not None:
            weight = weight * np.float32(0.5) ** (back / self.half_life).astype(np.float32)
        kept = back < self.limit
        return row[kept], last[kept], weight[kept]

    def matrix(self, users: UserBatch, items: int) -> sp.csr_matrix:
        """float32 [users, items]"""
        row, event, weight = self.entries(users)
        return sp.csr_matrix((weight, (row, users.gid[event])), shape=(len(users), items))


def history_space(config: Config) -> Space:
    """The dimensions of a history's use; weak signals are one where there are any."""
    longest = max(config.graph.max_history, config.two_tower.history)
    space: dict[str, Choice | Whole] = {
        "history": Whole(config.two_tower.history, 1, longest, log=True),
        "half_life": Choice(None, (None, 1, 2, 5, 15)),
    }
    if config.events.weak:
        space["weak"] = Choice(1.0, (1.0, 0.5, 0.2, 0.0))
    return space


def history_rule(data: KnownData, params: Params) -> HistoryRule:
    """The rule by which a recommender reads histories, from a point of ``history_space``."""
    return HistoryRule(params["history"], params["half_life"], params.get("weak", 1.0), data.positive)


def training_space(config: Config) -> Space:
    """How old events count in what a model is fitted to."""
    return {"days_half_life": Choice(None, (None, 30, 90, 365))}


def training_matrix(data: KnownData, params: Params) -> sp.csr_matrix:
    """float32 [users of ``data.users``, items]: each user's latest items, older ones weighing less if so tuned."""
    rule = HistoryRule(data.config.graph.max_history, None, params.get("weak", 1.0), data.positive)
    row, event, weight = rule.entries(data.users)
    if params.get("days_half_life") is not None:
        age = (data.moment - data.users.timestamp[event]) / (DAY * params["days_half_life"])
        weight = weight * np.float32(0.5) ** age.astype(np.float32)
    shape = (len(data.users), data.catalogue.items)
    return sp.csr_matrix((weight.astype(np.float32), (row, data.users.gid[event])), shape=shape)


def popular_space(config: Config) -> Space:
    """The window of popularity."""
    return {"popular_days": values_with(_POPULAR_DAYS, config.graph.window_days)}


def trend_space(config: Config, power: float) -> Space:
    """How much a model's scores are multiplied by what is popular now: by (1 + positive events in the last
    ``popular_days``)^``popular_power``."""
    return {**popular_space(config), "popular_power": Real(power, 0.0, 1.5)}


def favour_popular(score: Scorer, popularity: np.ndarray, power: float) -> Scorer:
    """``score`` times (1 + popularity)^power; scores below 0 become 0, and popularity orders equal ones. With power 0
    ``score`` as it is."""
    if power == 0:
        return score
    factor = torch.from_numpy((1.0 + popularity) ** power).float()
    small = torch.from_numpy(tie_break(popularity, below=_TIE))

    def favoured(first: int, last: int) -> Tensor:
        return score(first, last).clamp(min=0) * factor[first:last] + small[first:last]

    return favoured


def item_ranges(catalogue: Catalogue, joint: bool) -> list[tuple[int, int]]:
    """(first gid, last gid) of the items that one model is fitted to: all of them, or each type's."""
    return [(0, catalogue.items)] if joint else [catalogue.range_of(k) for k in range(len(catalogue.types))]


def join_parts(parts: list[tuple[int, int, Scorer]], users: int) -> Scorer:
    """One scorer from those of ranges of items (first gid, last gid, scorer), which together are the catalogue."""

    def score(first: int, last: int) -> Tensor:
        scores = torch.empty((users, last - first))
        for begin, end, part in parts:
            a, b = max(first, begin), min(last, end)
            if a < b:
                scores[:, a - first : b - first] = part(a, b)
        return scores

    return score


def empty_rows(matrix: sp.csr_matrix) -> np.ndarray:
    """bool [rows]: nothing is stored."""
    return np.diff(matrix.indptr) == 0


def tie_break(popularity: np.ndarray, below: float) -> np.ndarray:
    """float32 [items]: popularity, scaled to stay under ``below``; added to scores it orders equal ones."""
    return (popularity * (below / (1.0 + popularity.max(initial=0)))).astype(np.float32)
