"""The score that ranks a user's list, defined once.

    score(u, j) = <[u, 1], [v_j, b_j]> + sum of sparse terms
    b_j = sum of item terms

u and v_j are the towers' unit vectors. There are two kinds of terms. An **item term** is one number per item: trends
(trends.py) and the share of unseen items (unseen.py). It is part of b_j, so the index ranks by it. A **sparse term**
raises at most a few thousand items, selected by the user's history (memory.py), and never lowers a score.

:meth:`Scorer.dense` scores whole ranges of items, for validation and evaluation. :meth:`Scorer.candidates` asks an
index: an item that no sparse term raises and that is not in the index's top ``k`` has ``k`` better items, so the top
``k`` and the raised items contain the exact list. Both compute the same function, which a test verifies
(tests/unit/test_scorer.py). No term scans the catalogue for a request.

Imports neither dgl nor transformers, because serving replicas use it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int64
from torch import Tensor

from recsys_ray.core.errors import ArtifactError
from recsys_ray.scoring.memory import Memory, MemoryOfNew, Recalled
from recsys_ray.storage.artifacts import read_json

SCORE = "score.json"
MEMORY, TRENDS, UNSEEN = "memory", "trends", "unseen"
TERMS = (MEMORY, TRENDS, UNSEEN)  # terms in addition to the towers; each can be left out
ITEM_TERMS = (TRENDS, UNSEEN)
VECTOR = "vector"  # stored with the item terms in the two-tower's item files
LEARNED = "learned"  # beside it: the learned vectors, where the towers read them


def without(model: str, term: str) -> str:
    """What a model is called where ``term`` is left out of its score."""
    return f"{model}_without_{term}"


@dataclass(frozen=True)
class ScoreSpec:
    """What validation chose of the terms."""

    temperature: float = 0.1  # of the softmax that the towers were trained in
    half_life: float | None = 4.0  # of the history in the memory, places; None: all alike
    memory: float = 0.0  # weight of the memory; 0: none
    ridge: float = 0.0  # its ridge; 0: nothing was validated
    text_users: float = 0.0  # its users that an item's text stands for
    trends: list[float] = field(default_factory=list)  # weight of each item type; empty: none
    unseen_share: list[float | None] = field(default_factory=list)  # of each type, as of the test; None: no examples

    def save(self, folder: Path) -> None:
        text = json.dumps(asdict(self), indent=1)
        (folder / SCORE).write_text(text + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> ScoreSpec:
        try:
            return ScoreSpec(**read_json(folder / SCORE))
        except (OSError, TypeError, ValueError) as error:
            raise ArtifactError(f"{folder / SCORE} is not a valid score description: {error}") from error


_BEYOND = 32  # items that an index is asked for in addition to the list, so that few raised ones can get a place
_ROUNDING = 1e-5  # of a score


class Pairs(NamedTuple):
    """Items of several users, ascending by row and gid."""

    row: Int64[np.ndarray, "n"]
    gid: Int64[np.ndarray, "n"]

    @staticmethod
    def nothing() -> Pairs:
        return Pairs(np.empty(0, np.int64), np.empty(0, np.int64))


class Ranked(NamedTuple):
    """Items of several users: ascending by row, then best first, of equal scores the smaller gid."""

    row: Int64[np.ndarray, "n"]
    gid: Int64[np.ndarray, "n"]
    score: Float32[np.ndarray, "n"]

    @staticmethod
    def nothing() -> Ranked:
        return Ranked(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))

    @staticmethod
    def best(parts: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]], k: int) -> Ranked:
        """The best ``k`` of each row in all of the (row, gid, score)."""
        row, gid, score = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.lexsort((gid, -score, row))
        order = order[np.arange(len(order)) - np.searchsorted(row[order], row[order]) < k]
        return Ranked(row[order], gid[order], score[order])


@runtime_checkable
class Index(Protocol):
    """The items of one type that may be recommended, by inner product with [v_j, b_j]."""

    @property
    def exact(self) -> bool:
        """Whether every item is compared with a query."""
        ...

    def place(self, gids: Int64[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
        """Positions in the index; -1 for items that are not in it."""
        ...

    def search_each(
        self,
        queries: Float32[np.ndarray, "q wide"],
        k: int,
        forbidden: Pairs,
        allowed: Bool[np.ndarray, "items"] | None,
        beyond: int,
    ) -> Ranked:
        """The best ``k`` items of each query that are not ``forbidden``, and ``beyond`` more. ``allowed``: by position
        in the index; None: all."""
        ...

    def rank(
        self,
        queries: Float32[np.ndarray, "q wide"],
        k: int,
        raised: Recalled,
        forbidden: Pairs,
        allowed: Bool[np.ndarray, "items"] | None,
    ) -> Ranked:
        """As :meth:`search_each`, exact, and ``raised`` adds to scores before they are ranked."""
        ...


@dataclass(frozen=True)
class Scorer:
    """The only place where terms meet. Arrays may be memory maps."""

    wide: Float32[np.ndarray, "N wide"]  # [v_j, b_j] of each item, row = gid
    memory: Memory | None = None  # of one ridge
    weight: float = 0.0  # of the memory
    half_life: float | None = 1.0

    @staticmethod
    def of_items(
        items: Mapping[str, Float32[np.ndarray, "N *d"]], spec: ScoreSpec, memory: Memory | None, left_out: str = ""
    ) -> Scorer:
        """Of the towers' vectors and the item terms as the two-tower stage wrote them.

        Args:
            items: ``VECTOR`` [N, d] and item terms [N].
            memory: of the spec's ridge; None: there is none.
            left_out: a term that is not part of the score.
        """
        kept = memory if spec.memory and left_out != MEMORY else None
        return Scorer(with_item_terms(items, left_out), kept, spec.memory, spec.half_life)

    def raised(self, user: Int[np.ndarray, "n"], gid: Int[np.ndarray, "n"]) -> Recalled:
        """What the sparse terms add to the scores of users with these histories, ascending by user and gid.

        Args:
            user, gid: the events of all histories; of each user in one piece, oldest first.
        """
        if self.memory is None:
            return Recalled.nothing()
        return self._weighed(self.memory.recall(user, gid, self.half_life))

    def raised_new(self, user: Int[np.ndarray, "n"], gid: Int[np.ndarray, "n"], new: MemoryOfNew) -> Recalled:
        """As :meth:`raised`, of items that are not in the memory."""
        if self.memory is None:
            return Recalled.nothing()
        return self._weighed(new.recall(user, gid, len(self.wide), self.half_life))

    def _weighed(self, recalled: Recalled) -> Recalled:
        return recalled._replace(value=recalled.value * np.float32(self.weight))

    def dense(self, users: Float[Tensor, "B d"], raised: Recalled, first: int, last: int) -> Float[Tensor, "B items"]:
        """Scores of the items ``first <= gid < last``.

        Args:
            users: vectors of the user tower.
            raised: of these users' histories, see :meth:`raised`.
        """
        wide = torch.from_numpy(np.array(self.wide[first:last]))
        scores = users @ wide[:, :-1].T + wide[:, -1]
        here = (raised.gid >= first) & (raised.gid < last)
        row, column = torch.from_numpy(raised.user[here]), torch.from_numpy(raised.gid[here] - first)
        scores[row, column] += torch.from_numpy(raised.value[here, 0])
        return scores

    def candidates(
        self,
        indexes: Sequence[Index],
        users: Float32[np.ndarray, "q d"],
        raised: Recalled,
        k: int,
        forbidden: Pairs,
        allowed: Sequence[Bool[np.ndarray, "_"] | None] | None = None,
    ) -> Ranked:
        """The best ``k`` items of the indexes' types together, for each of some users.

        Args:
            users: vectors of the user tower.
            raised: of these users' histories, see :meth:`raised`; of any type, allowed or not.
            forbidden: what must not come.
            allowed: for each index, by position in it; None: all.
        """
        queries = as_queries(users)
        found: list[Ranked] = []
        searched = []
        for index, may in zip(indexes, allowed or [None] * len(indexes), strict=True):
            if index.exact:
                found.append(index.rank(queries, k, raised, forbidden, may))
            else:
                searched.append((index, may))
        if searched:
            found += self._searched(searched, queries, raised, k, forbidden)
        return Ranked.best(found, k)

    def _searched(
        self,
        asked: Sequence[tuple[Index, Bool[np.ndarray, "_"] | None]],
        queries: Float32[np.ndarray, "q wide"],
        raised: Recalled,
        k: int,
        forbidden: Pairs,
    ) -> list[Ranked]:
        """Parts of :meth:`candidates`, in no order: what the indexes find, and what is raised beside it."""
        beyond = _BEYOND if len(raised.gid) else 0
        found = [index.search_each(queries, k, forbidden, may, beyond) for index, may in asked]
        if not len(raised.gid):
            return found
        size = len(self.wide)
        row, gid, score = (np.concatenate(column) for column in zip(*found, strict=True))
        own = raised.user * size + raised.gid
        place = np.minimum(np.searchsorted(own, row * size + gid), len(own) - 1)
        hit = own[place] == row * size + gid
        total = score + np.where(hit, raised.value[place, 0], np.float32(0))
        # An index did not find an item: it scores at most as much as the last that it found, plus what it is raised by
        # (the threshold algorithm of Fagin et al., JCSS 2003). So the vectors of few items need to be read.
        least = _kth(row, total, k, len(queries))
        needed = [_needed(one, least, k + beyond) for one in found]
        more = raised.value[:, 0] >= np.min(needed, axis=0)[raised.user] - _ROUNDING
        more[place[hit]] = False
        more = np.flatnonzero(more)
        kept = np.zeros(len(more), bool)
        for (index, may), need in zip(asked, needed, strict=True):
            at = index.place(raised.gid[more])
            here = at >= 0 if may is None else (at >= 0) & may[at]
            kept |= here & (raised.value[more, 0] >= need[raised.user[more]] - _ROUNDING)
        more = more[kept]
        inside = forbidden.gid < size
        more = more[~among(own[more], (forbidden.row * size + forbidden.gid)[inside])]
        user, gid_more, value = raised.user[more], raised.gid[more], raised.value[more, 0]
        scores = np.einsum("nd,nd->n", self.wide[gid_more], queries[user]) + value
        return [Ranked(row, gid, total), Ranked(user, gid_more, scores)]


def _kth(
    row: Int64[np.ndarray, "n"], score: Float32[np.ndarray, "n"], k: int, queries: int
) -> Float32[np.ndarray, "queries"]:
    """The ``k``-th largest score of each row; -inf where there are fewer."""
    order = np.lexsort((-score, row))
    begin = np.searchsorted(row[order], np.arange(queries + 1))
    found = np.full(queries, -np.inf, np.float32)
    enough = np.flatnonzero(np.diff(begin) >= k)
    found[enough] = score[order[begin[enough] + k - 1]]
    return found


def _needed(found: Ranked, least: Float32[np.ndarray, "queries"], asked: int) -> Float32[np.ndarray, "queries"]:
    """How much an item that an index did not find must be raised by to reach the score ``least``; infinite where the
    index found fewer than ``asked``, and so everything."""
    needed = np.full(len(least), np.inf, np.float32)
    full = np.flatnonzero(np.bincount(found.row, minlength=len(least)) == asked)
    needed[full] = least[full] - found.score[np.searchsorted(found.row, full) + asked - 1]
    return needed


def with_item_terms(
    items: Mapping[str, Float32[np.ndarray, "N *d"]], left_out: str = ""
) -> Float32[np.ndarray, "N wide"]:
    """[v_j, b_j]; arguments as :meth:`Scorer.of_items`."""
    bias = np.zeros(len(items[VECTOR]), np.float32)
    for term in ITEM_TERMS:
        if term in items and term != left_out:
            bias += items[term]
    return np.column_stack([items[VECTOR], bias])


def as_queries(users: Float32[np.ndarray, "q d"]) -> Float32[np.ndarray, "q wide"]:
    """[u, 1] for vectors of users: what items [v_j, b_j] are asked with."""
    return np.concatenate([users, np.ones((len(users), 1), np.float32)], axis=1)


def among(values: Int[np.ndarray, "n"], ascending: Int[np.ndarray, "m"]) -> np.ndarray:
    """bool [n]: is each value in ``ascending``? A fifth of what np.isin takes for a few values."""
    if not len(ascending):
        return np.zeros(len(values), bool)
    values = values.astype(ascending.dtype, copy=False)  # of two types NumPy would convert the long one
    places = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return ascending[places] == values
