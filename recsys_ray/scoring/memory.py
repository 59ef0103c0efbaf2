"""Co-interaction memory: a sparse term that raises items chosen by users who share the history's items.

Two vectors of 128 numbers generalise, but they cannot store every pair of items that belong together. The
co-interaction graph has these pairs, so its edges are also used directly, like the wide part beside a deep one (Cheng
et al., Wide & Deep Learning for Recommender Systems, DLRS 2016; ours, not the papers'):

    memory(u, j) = w * log(1 + max(m_uj, 0) / SMALL),    m_uj = sum over i in history of u of a_ui * b'_ij
    a_ui proportional to 2^(-places back / half-life), their sum 1; of the latest REACH items, or all alike
    b'_ij = b_ij + c t_ij / (users of i + ridge)

b_.j is the ridge regression of having item j on having the items nearest to it (recsys_ray/scoring/ridge.py). Where few
users had j, b_.j knows little, so j is given some users more, c t_ij of each item i with one of the nearest texts
(recsys_ray/graph/texts.py). The ridge, the weight w and c are chosen on the validation period
(recsys_ray/scoring/choose.py), the half-life before training (recsys_ray/two_tower/recency.py); with weight 0 only the
towers remain. The memory never lowers a score, so the top of the index and the raised items contain the exact list
(recsys_ray/scoring/scorer.py).

Imports neither dgl nor transformers, because serving replicas use it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Int64

from recsys_ray.core.offsets import begins, offsets_of, spread
from recsys_ray.graph.texts import TextPairs
from recsys_ray.storage.artifacts import load_arrays, save_arrays

MEMORY_FILE = "memory.safetensors"  # of a bundle
RIDGES = (10.0, 30.0, 100.0, 300.0)  # which a validation chooses from
WEIGHTS = (0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0)  # likewise; of the temperature
TEXT_USERS = (0.0, 3.0, 10.0, 30.0)  # likewise: c
HALF_LIVES = (1.0, 4.0, 16.0, None)  # places; None: all items of a history alike; also
REACH = 50  # items, which bounds an answer's time; with 16 places a ninth of the weights would lie further back
SMALL = 1e-2
NEIGHBOURS = 100  # items that an item raises, per item type: those with the largest coefficients; likewise by texts
_TOGETHER = 1 << 15  # edges that are summed at once


class Recalled(NamedTuple):
    """The items raised by histories, ascending by user and gid."""

    user: Int[np.ndarray, "m"]
    gid: Int[np.ndarray, "m"]
    value: Float[np.ndarray, "m ridges"]  # float32: log(1 + max(m, 0) / SMALL)

    @staticmethod
    def nothing() -> Recalled:
        """No item comes to anybody's mind."""
        none = np.zeros(0, np.int64)
        return Recalled(none, none, np.zeros((0, 1), np.float32))


@dataclass(frozen=True)
class Memory:
    """The items that each item raises, row = gid; arrays may be memory maps."""

    begin: Int[np.ndarray, "items_plus_1"]
    gid: Int[np.ndarray, "edges"]  # int32, ascending in each row
    coefficient: Float[np.ndarray, "edges ridges"]  # float32: b, or b' once validation has chosen
    users: Int[np.ndarray, "items"]  # int32: how many had each item
    text: Float[np.ndarray, "edges"] | None = None  # float32: t; None: texts tell nothing, or are part of b'

    @staticmethod
    def of_edges(
        src: Int[np.ndarray, "n"],
        dst: Int[np.ndarray, "n"],
        coefficient: Float[np.ndarray, "n ridges"],
        users: Int[np.ndarray, "items"],
        ntype: Int[np.ndarray, "items"],
        most: int | None = None,
    ) -> Memory:
        """The items that src raises, in no order, each pair once. A very popular item would have a row as long as the
        catalogue, which would be too slow for an answer, so only the largest entries of each row are kept, ``most`` of
        each type (default: NEIGHBOURS)."""
        group = src.astype(np.int64) * (int(ntype.max(initial=0)) + 1) + ntype[dst]
        order = np.lexsort((dst, -coefficient.sum(1), group))
        group = group[order]
        kept = order[np.arange(len(group)) - np.searchsorted(group, group) < (most or NEIGHBOURS)]
        kept = kept[np.lexsort((dst[kept], src[kept]))]
        begin = np.concatenate([[0], np.cumsum(np.bincount(src[kept], minlength=len(users)))])
        return Memory(
            begin.astype(np.int64),
            dst[kept].astype(np.int32),
            coefficient[kept].astype(np.float32),
            users.astype(np.int32),
        )

    def with_texts(self, texts: TextPairs, ntype: Int[np.ndarray, "items"]) -> Memory:
        """The same with t. Of the items that a text resembles, as of the others, only the nearest are kept."""
        group = texts.src * (int(ntype.max(initial=0)) + 1) + ntype[texts.dst]
        order = np.lexsort((texts.dst, -texts.users, group))
        group = group[order]
        kept = order[np.arange(len(group)) - np.searchsorted(group, group) < NEIGHBOURS]
        size, ridges = len(self.users), self.coefficient.shape[1]
        own = np.repeat(np.arange(size), np.diff(self.begin)) * size + self.gid
        told = texts.src[kept] * size + texts.dst[kept]
        both = np.union1d(own, told)
        coefficient, text = np.zeros((len(both), ridges), np.float32), np.zeros(len(both), np.float32)
        coefficient[np.searchsorted(both, own)] = self.coefficient
        text[np.searchsorted(both, told)] = texts.users[kept]
        begin = np.searchsorted(both, np.arange(size + 1) * size)
        return Memory(begin.astype(np.int64), (both % size).astype(np.int32), coefficient, self.users, text)

    def at(self, ridge: float, text_users: Sequence[float] = (0.0,)) -> Memory:
        """b' of one ridge of ``RIDGES``: a column for each c in ``text_users``, or a single one where texts tell
        nothing. Pairs that are 0 in all columns are left out."""
        b = self.coefficient[:, RIDGES.index(ridge), None]
        if self.text is not None:
            users = np.repeat(self.users, np.diff(self.begin))
            b = b + self.text[:, None] * np.array(text_users, np.float32) / (users[:, None] + np.float32(ridge))
        kept = b.any(1)
        begin = np.concatenate([[0], np.cumsum(kept)])[self.begin]
        return Memory(begin, self.gid[kept], b[kept].astype(self.coefficient.dtype), self.users)

    def extended(
        self,
        src: Int[np.ndarray, "n"],
        dst: Int[np.ndarray, "n"],
        weight: Float[np.ndarray, "n"],
        users: Int[np.ndarray, "items"],
        anew: Int[np.ndarray, "m"],
        ntype: Int[np.ndarray, "items"],
        ridge: float,
        texts: TextPairs,
        text_users: float,
    ) -> Memory:
        """A copy in which the edges of the items ``anew`` are replaced.

        No system is solved: b_ij = weight of i -> j / (users of i + ridge), as if neighbours shared no users.

        Args:
            src, dst, weight: edges into ``anew`` and out of it, each once.
            texts: of the items ``anew``.
            users: of all items.
            ntype: of all items.
        """
        fresh = np.zeros(len(ntype), bool)
        fresh[anew] = True
        src, dst = np.concatenate([src, texts.src]), np.concatenate([dst, texts.dst])
        made = np.concatenate([weight, text_users * texts.users]) / (users[src] + ridge)
        # interactions and texts may tell of the same pair
        pairs, place = np.unique(src * len(ntype) + dst, return_inverse=True)
        old_src = np.repeat(np.arange(len(self.users)), np.diff(self.begin))
        kept = ~fresh[old_src] & ~fresh[self.gid]
        return Memory.of_edges(
            np.concatenate([old_src[kept], pairs // len(ntype)]),
            np.concatenate([self.gid[kept], pairs % len(ntype)]),
            np.concatenate([self.coefficient[kept], np.bincount(place, made, len(pairs))[:, None]]),
            users,
            ntype,
            2 * NEIGHBOURS,  # of interactions and of texts
        )

    def raisers(self, gid: int) -> Raisers:
        """The items that raise one; looks through all edges."""
        edges = np.flatnonzero(self.gid == gid)
        rows = np.searchsorted(self.begin, edges, side="right") - 1
        return Raisers(rows.astype(np.int32), self.coefficient[edges, 0])

    @staticmethod
    def load(path: Path) -> Memory:
        return Memory(**load_arrays(path))

    def save(self, path: Path) -> None:
        save_arrays(path, {name: array for name, array in vars(self).items() if array is not None})

    def recall(
        self,
        user: Int[np.ndarray, "n"],
        gid: Int[np.ndarray, "n"],
        half_life: float | None,
        within: slice | None = None,
    ) -> Recalled:
        """The items raised by histories.

        Args:
            user, gid: the events of all histories; of each user in one piece, oldest first.
            half_life: how many places back an item counts half of the last one; None: all count alike.
            within: gids of which to tell; None: all.

        Returns:
            Every pair with an edge.
        """
        return self.sums(*latest(user, gid, len(self.begin) - 1, half_life), within)

    def sums(
        self,
        user: Int64[np.ndarray, "n"],
        gid: Int64[np.ndarray, "n"],
        weight: Float[np.ndarray, "n"],
        within: slice | None = None,
    ) -> Recalled:
        """As :meth:`recall`, for each user's distinct items with their weights a, ascending by user."""
        before = offsets_of(self.begin[gid + 1] - self.begin[gid])
        # Whole users, with some _TOGETHER edges: so few that their arrays stay in the processor's cache.
        piece = before[np.searchsorted(user, user)] // _TOGETHER
        cuts = [*np.flatnonzero(begins(piece)).tolist(), len(user)]
        parts = [self._sums(user[a:b], gid[a:b], weight[a:b], within) for a, b in itertools.pairwise(cuts)]
        if not parts:
            return Recalled(user, gid, np.zeros((0, self.coefficient.shape[1]), np.float32))
        return Recalled(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _sums(
        self,
        user: Int64[np.ndarray, "n"],
        gid: Int64[np.ndarray, "n"],
        weight: Float[np.ndarray, "n"],
        within: slice | None,
    ) -> Recalled:
        """As :meth:`sums`, of a few users."""
        items, start = len(self.begin) - 1, self.begin[gid]
        count = self.begin[gid + 1] - start
        place, owner, share = spread(start, count), np.repeat(user - user[0], count), np.repeat(weight, count)
        near = self.gid[place]
        if within is not None:
            inside = (near >= within.start) & (near < within.stop)
            place, owner, near, share = place[inside], owner[inside], near[inside], share[inside]
        # (user, item) and behind it the edge's number in one integer: these sort faster than by argsort
        bits = len(place).bit_length()
        packed = ((owner * items + near) << bits) + np.arange(len(place))
        packed.sort()
        order = packed & ((1 << bits) - 1)
        first = np.flatnonzero(begins(packed >> bits))
        parts = self.coefficient[place[order]] * share[order, None]
        total = np.add.reduceat(parts, first, axis=0) if len(first) else parts
        value = np.log1p(np.maximum(total, 0) / SMALL).astype(np.float32)
        one = order[first]
        return Recalled(user[0] + owner[one], near[one].astype(np.int64), value)


def memory_file(two_tower: Path, snapshot: str) -> Path:
    """Where the two-tower stage keeps the memory of a snapshot, for both of its variants and with all ridges."""
    return two_tower / "memory" / f"{snapshot}.safetensors"


class Raisers(NamedTuple):
    """The items that raise one, with b'."""

    gid: Int[np.ndarray, "m"]  # int32
    coefficient: Float[np.ndarray, "m"]  # float32

    @staticmethod
    def of(texts: TextPairs, gid: int, users: Int[np.ndarray, "items"], ridge: float, text_users: float) -> Raisers:
        """Of the new item ``gid``, of which only texts tell, by the rule of :meth:`Memory.extended`."""
        mine = texts.dst == gid
        src = texts.src[mine]
        made = text_users * texts.users[mine] / (users[src] + ridge)
        return Raisers(src.astype(np.int32), made.astype(np.float32))


NO_RAISERS = Raisers(np.empty(0, np.int32), np.empty(0, np.float32))


@dataclass(frozen=True)
class MemoryOfNew:
    """What raises a few new items, numbered from 0."""

    raising: Int64[np.ndarray, "rows"]  # gids, ascending
    memory: Memory  # row = place in ``raising``

    @staticmethod
    def of(each: Sequence[Raisers]) -> MemoryOfNew:
        """``each``: of one new item after the other."""
        src = np.concatenate([np.empty(0, np.int64), *(one.gid for one in each)]).astype(np.int64)
        dst = np.repeat(np.arange(len(each), dtype=np.int32), [len(one.gid) for one in each])
        made = np.concatenate([np.empty(0, np.float32), *(one.coefficient for one in each)])
        raising, row = np.unique(src, return_inverse=True)
        order = np.argsort(row, kind="stable")
        size = max(len(raising), len(each))  # one set of numbers for rows and for what they raise
        begin = np.searchsorted(row[order], np.arange(size + 1))
        return MemoryOfNew(raising, Memory(begin, dst[order], made[order, None], np.zeros(size, np.int32)))

    def recall(
        self, user: Int[np.ndarray, "n"], gid: Int[np.ndarray, "n"], items: int, half_life: float | None
    ) -> Recalled:
        """The new items raised by histories; arguments as :meth:`Memory.recall`. ``items``: more than any gid."""
        user, gid, weight = latest(user, gid, items, half_life)
        place = np.searchsorted(self.raising, gid)
        here = np.flatnonzero(place < len(self.raising))
        here = here[self.raising[place[here]] == gid[here]]
        return self.memory.sums(user[here], place[here], weight[here])


def latest(
    user: Int[np.ndarray, "n"], gid: Int[np.ndarray, "n"], items: int, half_life: float | None
) -> tuple[Int64[np.ndarray, "m"], Int64[np.ndarray, "m"], Float[np.ndarray, "m"]]:
    """Each user's distinct items with their weights a, by the last time that they occur; of those that fade the
    latest."""
    user, gid = user.astype(np.int64), gid.astype(np.int64)
    backwards = (user * items + gid)[::-1]
    last = np.sort(len(user) - 1 - np.unique(backwards, return_index=True)[1])
    user, gid = user[last], gid[last]
    back = np.searchsorted(user, user, side="right") - np.arange(len(user)) - 1
    if half_life is None:
        weight = np.ones(len(user))
    else:
        user, gid, back = (part[back < REACH] for part in (user, gid, back))
        weight = 0.5 ** (back / half_life)
    sums = np.bincount(user, weight, minlength=1) if len(user) else np.ones(1)
    return user, gid, weight / sums[user]
