"""Queries of the evaluation: queries and truths of a shard of users, segments, popularity tiers.

A query is a user and an item type. Its truths are the items of the type with a positive event in the test period with
which the user had not interacted before. Everything here is plain numpy on one shard's columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recsys_ray.core.offsets import offsets_of
from recsys_ray.data.tables import Catalogue, Events

TIERS = 5
SEGMENTS = ("all", "warm", "new_to_type", "cold", "cold_items", *(f"tier{k + 1}" for k in range(TIERS)))


@dataclass(frozen=True)
class Queries:
    """Queries of a shard, sorted by (uid, item type), and their truths, sorted by (query, gid)."""

    uid: np.ndarray  # int64 [queries]
    item_type: np.ndarray  # int16 [queries]
    warm: np.ndarray  # bool [queries]: the user has an event before the cut
    new_to_type: np.ndarray  # bool [queries]: warm, and none of these on an item of the type
    truth_query: np.ndarray  # int64 [truths]
    truth_item: np.ndarray  # int64 [truths], gid

    def __len__(self) -> int:
        return len(self.uid)

    def keep_users(self, uids: np.ndarray) -> Queries:
        """Only the queries of these users."""
        kept = np.isin(self.uid, uids)
        renumbered = np.cumsum(kept) - 1
        truths = kept[self.truth_query]
        return Queries(
            self.uid[kept],
            self.item_type[kept],
            self.warm[kept],
            self.new_to_type[kept],
            renumbered[self.truth_query[truths]],
            self.truth_item[truths],
        )

    @staticmethod
    def join(parts: Sequence[Queries]) -> Queries:
        """One after the other."""
        first = offsets_of(np.array([len(part) for part in parts]))
        joined = {n: np.concatenate([getattr(part, n) for part in parts]) for n in Queries.__dataclass_fields__}
        joined["truth_query"] += np.repeat(first[:-1], [len(part.truth_query) for part in parts])
        return Queries(**joined)

    def as_arrays(self) -> dict[str, np.ndarray]:
        """Columns under their names, for safetensors."""
        return dict(vars(self))

    @classmethod
    def from_arrays(cls, arrays: dict[str, Any]) -> Queries:
        return cls(**{name: arrays[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class ItemFacts:
    """What decides an item's segment. Shape [items] each."""

    unseen: np.ndarray  # bool: no event at all before training ended
    tier: np.ndarray  # int8, 0 (head) to TIERS - 1 (tail)


def find_queries(events: Events, catalogue: Catalogue, positive: np.ndarray, cut: int, end: int) -> Queries:
    """Queries of the period ``cut <= timestamp < end``.

    Args:
        events: all events of some users.
        positive: bool [event names]: is this event a target?
        cut, end: unix seconds.
    """
    users, user = np.unique(events.uid, return_inverse=True)
    pair = user * np.int64(catalogue.items) + events.gid
    before = events.timestamp < cut
    wanted = ~before & (events.timestamp < end) & positive[events.event]
    touched = np.unique(pair[before])
    truths = np.setdiff1d(pair[wanted], touched)  # sorted by (user, gid), therefore by (user, type)
    truth_user, truth_item = np.divmod(truths, catalogue.items)

    types = len(catalogue.types)
    asked, truth_query = np.unique(truth_user * types + catalogue.type_of(truth_item), return_inverse=True)
    asked_user, asked_type = np.divmod(asked, types)
    touched_user, touched_item = np.divmod(touched, catalogue.items)
    warm = np.isin(asked_user, touched_user)
    knows_type = np.isin(asked, touched_user * types + catalogue.type_of(touched_item))
    return Queries(
        uid=users[asked_user],
        item_type=asked_type.astype(np.int16),
        warm=warm,
        new_to_type=warm & ~knows_type,
        truth_query=truth_query.astype(np.int64),
        truth_item=truth_item,
    )


def popularity_tiers(positives: np.ndarray, catalogue: Catalogue) -> np.ndarray:
    """int8 [items]: tier of each item inside its type, 0 the most popular.

    Items are ranked by their positive events and cut into ``TIERS`` groups that hold equally many events; items
    without any are in the last.

    Args:
        positives: int64 [items], positive events before the test period.
    """
    tier = np.full(catalogue.items, TIERS - 1, dtype=np.int8)
    for k in range(len(catalogue.types)):
        first, last = catalogue.range_of(k)
        count = positives[first:last]
        if not count.sum():
            continue
        order = np.argsort(-count, kind="stable")
        ahead = np.cumsum(count[order]) - count[order]
        tier[first + order] = np.minimum(TIERS * ahead // count.sum(), TIERS - 1)
    return tier


def segment_truths(queries: Queries, facts: ItemFacts) -> dict[str, np.ndarray]:
    """For every segment, bool [truths]: which truths count in it. A query is in a segment if one of its truths is.

    Segments of users take a query's truths all or none. ``cold_items`` and the tiers are of warm users, with only
    the truths that are such items.
    """
    warm = queries.warm[queries.truth_query]
    masks = {
        "all": np.ones(len(queries.truth_item), dtype=bool),
        "warm": warm,
        "new_to_type": queries.new_to_type[queries.truth_query],
        "cold": ~warm,
        "cold_items": warm & facts.unseen[queries.truth_item],
    }
    for k in range(TIERS):
        masks[f"tier{k + 1}"] = warm & (facts.tier[queries.truth_item] == k)
    return masks


def segment_queries(queries: Queries, masks: dict[str, np.ndarray]) -> np.ndarray:
    """bool [queries, segments]: membership, columns in the order of ``SEGMENTS``."""
    member = np.zeros((len(queries), len(SEGMENTS)), dtype=bool)
    for column, name in enumerate(SEGMENTS):
        member[queries.truth_query[masks[name]], column] = True
    return member
