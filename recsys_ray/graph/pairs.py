"""Counts which items users share, in bounded memory: plain NumPy, no Ray.

A pair counts less the further apart its items are in the user's history, and half from the later item to the earlier:

    weight of a -> b = sum over users that have both of 2^(-(places from a to b - 1) / half_life)   where b came later
                                                    half of that                                    where b came first

so that items chosen soon after a rank before items that the same users chose at other times (ours, not the papers').
:func:`message_weights` makes of these weights what the HGNN's messages count.

A pair of one user is one integer with a < b, ``(a * items + b) << bits | recency | order | places``: one sort of
integers gives the number of users that share it, its weight in both directions and the latest time at which it was
shared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int

from recsys_ray.core.errors import ConfigError
from recsys_ray.core.offsets import begins
from recsys_ray.core.seeds import splitmix64
from recsys_ray.graph.snapshots import Fold

PAIRS_AT_ONCE = 2_000_000  # pairs that are expanded and sorted together; 8 bytes each, a few times over
HOLD = 8_000_000  # counted pairs that one task holds before it writes them out, over all windows; 40 bytes each
ONE = 256  # of Counted.weight: whole numbers add up to the same in any order
_PLACE_BITS = 8  # of a key: which item came first, and the distance in places, at most 127


@dataclass(frozen=True)
class Window:
    """Interactions with ``start <= timestamp < time``, but none of the users of the fold ``without``."""

    start: int
    time: int
    without: Fold | None = None

    def holds(self, uid: np.ndarray, timestamp: np.ndarray) -> np.ndarray:
        """bool [n]: which events are inside."""
        inside = (timestamp >= self.start) & (timestamp < self.time)
        return inside if self.without is None else inside & ~self.without.has(uid)


@dataclass(frozen=True)
class Counted:
    """Directed edges: src, dst int32, support int32 (users), weight int64 (in parts of ``ONE``), recency int32 (grows
    with time)."""

    src: np.ndarray
    dst: np.ndarray
    support: np.ndarray
    weight: np.ndarray
    recency: np.ndarray

    def __len__(self) -> int:
        return len(self.src)

    def take(self, index: np.ndarray | slice) -> Counted:
        return Counted(*(column[index] for column in vars(self).values()))

    @staticmethod
    def none() -> Counted:
        return Counted(*(np.zeros(0, np.int64 if name == "weight" else np.int32) for name in COLUMNS))

    @staticmethod
    def concatenate(parts: list[Counted]) -> Counted:
        return Counted(*(np.concatenate([getattr(p, n) for p in parts]) for n in COLUMNS))


COLUMNS = tuple(Counted.__dataclass_fields__)


def key_bits(items: int) -> tuple[int, int]:
    """Bits that are left beside both items of a pair: for its time (at most 16), and for order and places (at least
    one: gids are int32)."""
    left = 63 - 2 * max(1, (items - 1).bit_length())
    places = min(_PLACE_BITS, left)
    return min(16, left - places), places


def latest_items(
    uid: np.ndarray, gid: np.ndarray, timestamp: np.ndarray, window: Window, max_history: int, items: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each user's distinct items inside a window, the ``max_history`` latest of them.

    Args:
        uid, gid, timestamp: events [n], of each user in the order in which they happened.

    Returns:
        uid, gid and the item's latest timestamp, in the order of the events.
    """
    inside = window.holds(uid, timestamp)
    uid, gid, timestamp = uid[inside], gid[inside], timestamp[inside]
    if len(uid) == 0:
        return uid, gid, timestamp
    user = np.cumsum(np.r_[0, uid[1:] != uid[:-1]])
    key = user * items + gid
    order = np.argsort(key, kind="stable")
    key = key[order]
    latest = np.sort(order[np.r_[key[1:] != key[:-1], True]])  # events come in order of time: the last one counts
    ends = np.cumsum(np.bincount(user[latest]))
    latest = latest[ends[user[latest]] - np.arange(len(latest)) <= max_history]
    return uid[latest], gid[latest], timestamp[latest]


def pair_keys(
    uid: np.ndarray, gid: np.ndarray, timestamp: np.ndarray, window: Window, items: int
) -> Iterator[np.ndarray]:
    """Keys of all unordered pairs of a user's items, unsorted, at most about ``PAIRS_AT_ONCE`` at a time.

    A pair is as recent as the later of its two items, because that event made it.
    """
    starts = np.flatnonzero(begins(uid))
    sizes = np.diff(np.append(starts, len(uid)))
    time_bits, place_bits = key_bits(items)
    age = np.maximum(0, timestamp - window.start)
    step = max(1, -(-(window.time - window.start) // (1 << time_bits)))
    total = np.cumsum(sizes * (sizes - 1) // 2)
    begin = 0
    while begin < len(starts):
        done = total[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(total, done + PAIRS_AT_ONCE, side="right")))
        low, high = starts[begin], starts[end - 1] + sizes[end - 1]
        # Item x of a user pairs with the ``followers`` that come after it.
        followers = np.repeat(starts[begin:end] + sizes[begin:end], sizes[begin:end]) - np.arange(low, high) - 1
        left = np.repeat(np.arange(low, high), followers)
        right = left + 1 + np.arange(len(left)) - np.repeat(np.cumsum(followers) - followers, followers)
        a, b = np.minimum(gid[left], gid[right]).astype(np.int64), np.maximum(gid[left], gid[right])
        key = ((a * items + b) << time_bits) | np.maximum(age[left], age[right]) // step
        key = (key << 1) | (gid[left] > gid[right])
        yield (key << (place_bits - 1)) | np.minimum(right - left, (1 << (place_bits - 1)) - 1)
        begin = end


class Pairs(NamedTuple):
    """Counted unordered pairs."""

    key: np.ndarray  # int64, ascending: a * items + b with a < b
    support: np.ndarray  # int64: users
    forth: np.ndarray  # int64: weight of a -> b, in parts of ONE
    back: np.ndarray  # int64: of b -> a
    recency: np.ndarray  # int64


def count_keys(keys: np.ndarray, items: int, half_life: float | None) -> Pairs:
    """The distinct pairs among the keys of :func:`pair_keys`. ``half_life``: in places; None: all pairs weigh 1 in both
    directions."""
    keys = np.sort(keys)
    time_bits, place_bits = key_bits(items)
    pair = keys >> (time_bits + place_bits)
    starts = np.flatnonzero(begins(pair))
    last = np.append(starts[1:], len(pair))[: len(starts)] - 1
    order_and_places = keys & ((1 << place_bits) - 1)
    if len(starts) == 0:
        return Pairs(*(np.zeros(0, np.int64) for _ in Pairs._fields))
    forth, back = (np.add.reduceat(table[order_and_places], starts) for table in _weights(place_bits, half_life))
    recency = (keys[last] >> place_bits) & ((1 << time_bits) - 1)
    return Pairs(pair[starts], last - starts + 1, forth, back, recency)


def _weights(place_bits: int, half_life: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Weights of a -> b and of b -> a, int64 [2^place_bits], by the lowest bits of a key."""
    codes = np.arange(1 << place_bits)
    if half_life is None:
        return np.full(len(codes), ONE), np.full(len(codes), ONE)
    b_first = codes >> (place_bits - 1) == 1
    places = np.maximum(codes & ((1 << (place_bits - 1)) - 1), 1)
    weight = ONE * 0.5 ** ((places - 1) / half_life)
    forth, back = (np.rint(weight * np.where(early, 1.0, 0.5)).astype(np.int64) for early in (~b_first, b_first))
    return forth, back


class PairCounter:
    """Counts the pairs of many chunks of users; hands out what it holds when that becomes too much."""

    def __init__(self, items: int, window: Window, max_history: int, half_life: float | None, hold: int = HOLD) -> None:
        self._items, self._window, self._max_history, self._hold = items, window, max_history, hold
        self._half_life = half_life
        self._held: list[Pairs] = []
        self._size = 0

    def add(self, uid: np.ndarray, gid: np.ndarray, timestamp: np.ndarray) -> Iterator[Counted]:
        """Count events [n] of whole users (ascending by uid); yields full holds, as :meth:`flush` does."""
        latest = latest_items(uid, gid, timestamp, self._window, self._max_history, self._items)
        for keys in pair_keys(*latest, self._window, self._items):
            counted = count_keys(keys, self._items, self._half_life)
            self._held.append(counted)
            self._size += len(counted.key)
            if self._size > self._hold:
                self._merge()
                if self._size > self._hold // 2:  # merging did not help: the pairs are mostly distinct
                    yield self.flush()

    def flush(self) -> Counted:
        """What is held, as directed edges in both directions sorted by (dst, src); empties the counter."""
        self._merge()
        if not self._held:
            return Counted.none()
        found = self._held.pop()
        self._size = 0
        a, b = (found.key // self._items).astype(np.int32), (found.key % self._items).astype(np.int32)
        both = Counted(
            np.concatenate([a, b]),
            np.concatenate([b, a]),
            np.concatenate([found.support, found.support]).astype(np.int32),
            np.concatenate([found.forth, found.back]),
            np.concatenate([found.recency, found.recency]).astype(np.int32),
        )
        return both.take(np.argsort(both.dst.astype(np.int64) * self._items + both.src))

    def _merge(self) -> None:
        if len(self._held) > 1:
            key, *sums, recency = (np.concatenate(column) for column in zip(*self._held, strict=True))
            self._held = [Pairs(*_sum_by_key(key, sums, recency))]
        self._size = sum(len(held.key) for held in self._held)


def _sum_by_key(key: np.ndarray, sums: Sequence[np.ndarray], recency: np.ndarray) -> list[np.ndarray]:
    """Distinct keys, ascending, the sums of each column, and the latest recency."""
    order = np.argsort(key, kind="stable")
    key = key[order]
    first = np.flatnonzero(begins(key))
    if len(first) == 0:
        return [key, *sums, recency]
    added = [np.add.reduceat(column[order], first) for column in sums]
    return [key[first], *added, np.maximum.reduceat(recency[order], first)]


def merge(parts: list[Counted], items: int) -> Counted:
    """Sum what several tasks counted of the same edges; sorted by (dst, src)."""
    whole = Counted.concatenate(parts)
    key = whole.dst.astype(np.int64) * items + whole.src
    key, support, weight, recency = _sum_by_key(key, [whole.support, whole.weight], whole.recency)
    return Counted((key % items).astype(np.int32), (key // items).astype(np.int32), support, weight, recency)


def allowed_relations(relations: str | Sequence[tuple[str, str]], item_types: Sequence[str]) -> np.ndarray:
    """bool [types, types], symmetric: which pairs of item types make edges (``graph.relations``).

    Raises:
        ConfigError: a pair names an item type that there is not.
    """
    same = np.eye(len(item_types), dtype=bool)
    if isinstance(relations, str):
        return {"all": np.ones_like(same), "same_type": same, "cross_type": ~same}[relations]
    unknown = sorted({name for pair in relations for name in pair} - set(item_types))
    if unknown:
        raise ConfigError(f"graph.relations contains {unknown[0]!r}, but the item types are {', '.join(item_types)}")
    allowed = np.zeros_like(same)
    for a, b in relations:
        i, j = item_types.index(a), item_types.index(b)
        allowed[i, j] = allowed[j, i] = True
    return allowed


def keep_best(edges: Counted, ntype: np.ndarray, min_support: int, max_neighbors: int, seed: int) -> Counted:
    """Drop edges below ``min_support``, then keep of each (dst, type of src) the ``max_neighbors`` best.

    Better is more weight, then more recent, then a hash of the pair and the seed (any order by id would favour items
    that happen to come first). The result does not depend on how the work was split.
    """
    edges = edges.take(edges.support >= min_support)
    types = int(ntype.max()) + 1
    group = edges.dst.astype(np.int64) * types + ntype[edges.src]
    sizes = np.bincount(group - group.min()) if len(group) else group
    crowded = np.flatnonzero(sizes[group - group.min()] > max_neighbors) if len(group) else group
    if len(crowded) == 0:
        return edges
    rivals, group = edges.take(crowded), group[crowded] - group.min()
    order = _best_first(rivals, group, seed)
    group = group[order]
    rank = np.arange(len(group)) - np.searchsorted(group, group)
    kept = np.ones(len(edges), bool)
    kept[crowded[order[rank >= max_neighbors]]] = False
    return edges.take(kept)


def _best_first(edges: Counted, group: np.ndarray, seed: int) -> np.ndarray:
    """Order of edges (sorted by dst, src) by group, then from the best to the worst."""
    weight, recency = edges.weight.max() - edges.weight, edges.recency.max() - edges.recency.astype(np.int64)
    tie = (edge_hash(edges.src, edges.dst, seed) >> np.uint64(48)).astype(np.int64)  # 16 bits; then by src
    bits = [int(column.max()).bit_length() for column in (group, weight, recency)]
    if sum(bits) + 16 > 63:
        return np.lexsort((tie, recency, weight, group))
    key = (group << bits[1]) | weight  # all in one integer: one sort instead of four
    return np.argsort((((key << bits[2]) | recency) << 16) | tie, kind="stable")


def strengths(dst: Int[np.ndarray, "n"], weight: Float[np.ndarray, "n"], items: int) -> Float32[np.ndarray, "items"]:
    """Sum of the weights of the edges that end in each item."""
    return np.bincount(dst, weight, minlength=items).astype(np.float32)


def message_weights(
    src: Int[np.ndarray, "n"],
    dst: Int[np.ndarray, "n"],
    weight: Float[np.ndarray, "n"],
    strength: Float32[np.ndarray, "items"],
) -> Float32[np.ndarray, "n"]:
    """What a message over each edge counts: w_ij / sqrt(d_i d_j), the symmetric normalisation of Kipf and Welling
    (ICLR 2017), with the sums of weights d_i (:func:`strengths`). Otherwise items that are neighbours of many would
    drown the rest."""
    both = strength[src] * strength[dst]
    return (weight / np.sqrt(np.where(both > 0, both, 1))).astype(np.float32)


def edge_hash(src: np.ndarray, dst: np.ndarray, seed: int) -> np.ndarray:
    """A well-mixed uint64 of each edge."""
    return splitmix64((src.astype(np.uint64) << np.uint64(32)) ^ dst.astype(np.uint64), seed)
