"""The interface that every recommender implements, and full ranking with it. No Ray in here.

A recommender scores ranges of items for a batch of users from their events before the test period. ``rank`` turns
scores into lists: items of one type only, without unavailable and seen items, ties broken by gid, in memory that does
not grow with the catalogue.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from recsys_ray.core.offsets import offsets_of, spread
from recsys_ray.data.tables import Catalogue, Events
from recsys_ray.evaluation.metrics import CUTOFF, DEPTH, find_hits
from recsys_ray.evaluation.segments import SEGMENTS, Queries

_CELLS = 1 << 25  # scores held at once: 128 MB of float32
_MIN_COLUMNS = 1024  # items at once at least


@dataclass(frozen=True)
class UserBatch:
    """Some users and what they did before the test period; user k's events are ``offsets[k]:offsets[k + 1]``."""

    uid: np.ndarray  # int64 [users]
    offsets: np.ndarray  # int64 [users + 1]
    gid: np.ndarray  # int64 [events], in order of time
    event: np.ndarray  # int8 [events]
    timestamp: np.ndarray  # int64 [events], unix seconds
    users: pa.Table | None = field(default=None, repr=False)  # their rows of ingest/users.parquet, in this order

    def __len__(self) -> int:
        return len(self.uid)

    @property
    def rows(self) -> np.ndarray:
        """int64 [events]: place in the batch of each event's user."""
        return np.repeat(np.arange(len(self.uid)), np.diff(self.offsets))

    @property
    def empty(self) -> np.ndarray:
        """bool [users]: no history."""
        return np.diff(self.offsets) == 0

    def take(self, rows: np.ndarray) -> UserBatch:
        """The batch of these users, in this order."""
        length = np.diff(self.offsets)[rows]
        chosen = spread(self.offsets[rows], length)
        users = self.users.take(rows) if self.users is not None else None
        return UserBatch(
            self.uid[rows], offsets_of(length), self.gid[chosen], self.event[chosen], self.timestamp[chosen], users
        )


def batch_of(uids: np.ndarray, history: Events, users: pa.Table | None = None) -> UserBatch:
    """The batch of ``uids`` (sorted, each once; users without events are allowed).

    Args:
        history: events before the test period, sorted by (uid, timestamp), of any users.
        users: the rows of the users table that belong to ``uids``, in the same order.
    """
    first = np.searchsorted(history.uid, uids, side="left")
    length = np.searchsorted(history.uid, uids, side="right") - first
    events = history.select(spread(first, length))
    return UserBatch(np.asarray(uids), offsets_of(length), events.gid, events.event, events.timestamp, users)


def stranger_name(model: str) -> str:
    """The name of a model that is queried with another user's history."""
    return f"{model}_for_a_stranger"


Scorer = Callable[[int, int], Float[Tensor, "users items"]]


@runtime_checkable
class Recommender(Protocol):
    """Any model of the comparison.

    It travels to Ray tasks: it holds numpy arrays (which workers share) and small modules.
    """

    @property
    def name(self) -> str:
        """What the table calls it."""
        ...

    def scorer(self, users: UserBatch) -> Scorer:
        """Work out what is needed of these users once; the result scores items ``first <= gid < last``.

        Higher is better. -inf keeps an item out of the list. A user without history gets a sensible answer.
        """
        ...


def popular_where(empty: np.ndarray, score: Scorer, popularity: np.ndarray) -> Scorer:
    """``score``, but by popularity for the users that ``empty`` (bool [users]) marks."""
    if not empty.any():
        return score
    chosen = torch.from_numpy(empty)

    def filled(first: int, last: int) -> Tensor:
        scores = score(first, last)
        scores[chosen] = torch.tensor(popularity[first:last], dtype=torch.float32)
        return scores

    return filled


@dataclass(frozen=True)
class Stranger:
    """A model queried with the history and traits of the next user in the batch.

    Items that the user has seen are left out as always. The difference to the model's own hits is personal: popularity,
    trends and activity work equally well for any user."""

    model: Recommender

    @property
    def name(self) -> str:
        return stranger_name(self.model.name)

    def scorer(self, users: UserBatch) -> Scorer:
        return self.model.scorer(users.take(np.roll(np.arange(len(users)), -1)))


def top_k(scores: Float[Tensor, "users items"], k: int) -> tuple[Float[Tensor, "users k"], Tensor]:
    """The ``k`` best columns of each row, best first; equal scores in order of column.

    ``torch.topk`` alone may keep any of several equal scores, which would make results differ between machines.

    Returns:
        Scores and columns (int64), both [users, min(k, items)].
    """
    k = min(k, scores.shape[1])
    values, columns = scores.topk(k, dim=1)
    edge = values[:, -1:]
    split = torch.isfinite(edge[:, 0]) & ((scores == edge).sum(1) > (values == edge).sum(1))
    if split.any():  # equal scores on both sides of the k-th place: keep the first columns
        part, bound = scores[split], edge[split]
        above, equal = part > bound, part == bound
        room = k - above.sum(1, keepdim=True)
        kept = above | (equal & (equal.cumsum(1, dtype=torch.int32) <= room))
        columns[split] = kept.nonzero()[:, 1].view(-1, k)
    columns = columns.sort(1).values
    values, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


def rank(
    recommender: Recommender,
    users: UserBatch,
    catalogue: Catalogue,
    item_type: int,
    always: tuple[np.ndarray, np.ndarray] | None = None,
    k: int = DEPTH,
) -> np.ndarray:
    """The ``k`` best items of a type for each user, without unavailable items and those of the user's history.

    Args:
        always: (row, gid) of items that take part though they are unavailable: the truths of queries.

    Returns:
        int64 [users, k]: gids, best first; -1 where fewer can be recommended.

    Raises:
        ValueError: the recommender gave a score that is not a number.
    """
    first, last = catalogue.range_of(item_type)
    step = max(_CELLS // max(len(users), 1), _MIN_COLUMNS)
    score = recommender.scorer(users)
    best_values = torch.full((len(users), 0), -torch.inf)
    best_items = torch.zeros((len(users), 0), dtype=torch.int64)
    for start in range(first, last, step):
        stop = min(start + step, last)
        # A copy: a recommender may hand out what it keeps. Masks are written into it.
        scores = torch.empty((len(users), stop - start)).copy_(score(start, stop))
        if torch.isnan(scores).any():
            raise ValueError(f"{recommender.name} gave a score that is not a number")
        _mask(scores, users, catalogue, start, stop, always)
        values, columns = top_k(scores, k)
        # Both halves are in order of score and then gid, and all gids of the first are smaller: a stable sort merges.
        values = torch.cat([best_values, values], dim=1)
        items = torch.cat([best_items, columns + start], dim=1)
        values, order = values.sort(dim=1, descending=True, stable=True)
        best_values, best_items = values[:, :k], items.gather(1, order)[:, :k]
    ranked = np.full((len(users), k), -1, dtype=np.int64)
    found = torch.where(best_values > -torch.inf, best_items, -1).numpy()
    ranked[:, : found.shape[1]] = found
    return ranked


def _mask(
    scores: Tensor,
    users: UserBatch,
    catalogue: Catalogue,
    start: int,
    stop: int,
    always: tuple[np.ndarray, np.ndarray] | None,
) -> None:
    """Write -inf over what must not be recommended among the items ``start <= gid < stop``."""

    def inside(rows: np.ndarray, gids: np.ndarray) -> tuple[Tensor, Tensor]:
        here = (gids >= start) & (gids < stop)
        return torch.from_numpy(rows[here]), torch.from_numpy(gids[here] - start)

    kept = inside(*always) if always is not None else None
    own = scores[kept] if kept is not None else None
    hidden = np.flatnonzero(~catalogue.available[start:stop])
    if len(hidden):
        scores[:, torch.from_numpy(hidden)] = -torch.inf
    if kept is not None and own is not None:
        scores[kept] = own
    scores[inside(users.rows, users.gid)] = -torch.inf


@dataclass(frozen=True)
class Ranked:
    """What evaluation keeps of the rankings of some queries."""

    hit_query: np.ndarray  # int64 [hits], ordered by query
    hit_rank: np.ndarray  # int64 [hits], from 0
    hit_truth: np.ndarray  # int64 [hits], number of the truth
    covered: np.ndarray  # bool [segments, items]: recommended to anyone in the segment
    heads: np.ndarray = field(  # int32 [queries, CUTOFF]: the first places of each list, -1 where it is shorter
        default_factory=lambda: np.zeros((0, CUTOFF), dtype=np.int32), repr=False
    )


def rank_queries(
    recommender: Recommender,
    queries: Queries,
    member: np.ndarray,
    history: Events,
    users: pa.Table | None,
    catalogue: Catalogue,
    batch_size: int,
) -> Ranked:
    """Rank for every query and note where its truths stand.

    Args:
        member: bool [queries, segments], columns in the order of ``SEGMENTS``.
        history: events before the test period of the queries' users, sorted by (uid, timestamp).
        users: one row for each distinct user of the queries, in ascending order of uid.
        batch_size: queries ranked at once.
    """
    covered = np.zeros((len(SEGMENTS), catalogue.items), dtype=bool)
    heads = np.full((len(queries), CUTOFF), -1, dtype=np.int32)
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    everyone = np.unique(queries.uid)
    for item_type in range(len(catalogue.types)):
        of_type = np.flatnonzero(queries.item_type == item_type)  # a user is in it at most once
        for start in range(0, len(of_type), batch_size):
            chosen = of_type[start : start + batch_size]
            uids = queries.uid[chosen]
            table = users.take(np.searchsorted(everyone, uids)) if users is not None else None
            truths = np.flatnonzero(np.isin(queries.truth_query, chosen))
            row, item = np.searchsorted(chosen, queries.truth_query[truths]), queries.truth_item[truths]
            ranked = rank(recommender, batch_of(uids, history, table), catalogue, item_type, always=(row, item))
            heads[chosen] = ranked[:, :CUTOFF]
            for column in range(len(SEGMENTS)):
                shown = ranked[member[chosen, column]]
                covered[column, shown[shown >= 0]] = True
            query, place, truth = find_hits(ranked, row, item)
            found.append((chosen[query], place, truths[truth]))
    hit_query, hit_rank, hit_truth = (
        np.concatenate([part[k] for part in found]) if found else np.zeros(0, dtype=np.int64) for k in range(3)
    )
    order = np.lexsort((hit_rank, hit_query))
    return Ranked(hit_query[order], hit_rank[order], hit_truth[order], covered, heads)


def as_tensor(array: np.ndarray) -> Tensor:
    """A tensor that shares the array's memory. Arrays out of Ray's object store are read-only; so is this then."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(array)
