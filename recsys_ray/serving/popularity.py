"""What is popular: users per item over the window's positives, in the world and by country."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys_ray.graph.activity import NEVER
from recsys_ray.serving.histories import Events, mapped_arrays

_PRIOR = 100.0  # how many events the world's ranking counts as beside a country's own
_OLDEST = np.iinfo(np.int64).min + 1


@dataclass(frozen=True)
class Popularity:
    """Users per item over the window's positives, in the world and by country."""

    world: npt.NDArray[np.int64]  # [items] users
    rank: npt.NDArray[np.int32]  # [items] place in the world's order, 0 first: no two alike
    offsets: npt.NDArray[np.int64]  # [countries + 1] into:
    gids: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int32]

    @classmethod
    def load(cls, path: Path) -> Popularity:
        arrays = {name: tensor.numpy() for name, tensor in mapped_arrays(path).items()}
        return cls(**arrays)

    def by_country(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """country (-1: unknown), gid and users, as :meth:`PopularityCounter.counts` gave them."""
        country = np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))
        rest = self.world - np.bincount(self.gids, self.counts, minlength=len(self.world)).astype(np.int64)
        nowhere = np.flatnonzero(rest)
        return (
            np.concatenate([np.full(len(nowhere), -1), country]),
            np.concatenate([nowhere, self.gids]),
            np.concatenate([rest[nowhere], self.counts]),
        )

    def with_new_items(self, counter: PopularityCounter, published: npt.NDArray[np.int64]) -> dict[str, Any]:
        """Arrays of this popularity and that of further items, whose users ``counter`` has counted; ``published`` is
        that of all items."""
        pairs = zip(self.by_country(), counter.counts(), strict=True)
        country, gid, users = (np.concatenate(pair).astype(np.int64) for pair in pairs)
        order = np.lexsort((gid, country))
        return popularity_arrays(country[order], gid[order], users[order], published, len(self.offsets) - 1)

    def scores(self, country: int = -1) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """Share of users [items] that each item has, and the gids that the country itself contributed.

        A small country says little, so its counts are added to as many as ``_PRIOR`` of the world's.
        """
        share = self.world / max(int(self.world.sum()), 1)
        if country < 0 or country >= len(self.offsets) - 1:
            return share, np.empty(0, np.int64)
        rows = slice(self.offsets[country], self.offsets[country + 1])
        gids, counts = self.gids[rows].astype(np.int64), self.counts[rows]
        scores = share * _PRIOR
        scores[gids] += counts
        return scores / (_PRIOR + counts.sum()), gids

    def top(
        self, k: int, allowed: npt.NDArray[np.bool_], country: int = -1
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Scores and gids of the best ``k`` items that are ``allowed`` [items]; and whether the country made them."""
        scores, local = self.scores(country)
        candidates = np.flatnonzero(allowed)
        if len(candidates) > 4 * k:  # sort only those that can be among the best
            limit = np.partition(scores[candidates], -k)[-k]
            candidates = candidates[scores[candidates] >= limit]
        best = candidates[np.lexsort((self.rank[candidates], -scores[candidates]))[:k]]
        return scores[best], best, np.isin(best, local)


class PopularityCounter:
    """Adds up users of items, batch by batch of whole users."""

    def __init__(self, items: int, country: npt.NDArray[np.int64]) -> None:
        """``country`` [users]: index into the list of countries, -1 where unknown."""
        self._items, self._country = items, country
        self._keys, self._users = np.empty(0, np.int64), np.empty(0, np.int64)

    def add(self, events: Events) -> None:
        """Each user of ``events`` counts once for an item; no user may be in two batches."""
        uid, gid = np.divmod(np.unique(events.uid * self._items + events.gid), self._items)
        new, counts = np.unique((self._country[uid] + 1) * self._items + gid, return_counts=True)
        merged, place = np.unique(np.concatenate([self._keys, new]), return_inverse=True)
        total = np.bincount(place, np.concatenate([self._users, counts]), minlength=len(merged))
        self._keys, self._users = merged, total.astype(np.int64)

    def counts(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """country (-1: unknown), gid and users, ascending by country and gid."""
        country, gid = np.divmod(self._keys, self._items)
        return country - 1, gid, self._users


def popularity_arrays(
    country: npt.NDArray[np.int64],
    gid: npt.NDArray[np.int64],
    users: npt.NDArray[np.int64],
    published: npt.NDArray[np.int64],
    countries: int,
) -> dict[str, npt.NDArray[Any]]:
    """What :meth:`Popularity.load` reads, of what :meth:`PopularityCounter.counts` gave.

    Equally popular items are ranked by date of publication (``published`` [items], ``NEVER`` where unknown), the
    newest first.
    """
    items = len(published)
    world = np.bincount(gid, users, minlength=items).astype(np.int64)
    newest = np.where(published == NEVER, _OLDEST, published)
    rank = np.empty(items, np.int32)
    rank[np.lexsort((np.arange(items), -newest, -world))] = np.arange(items)
    named = country >= 0
    sizes = np.bincount(country[named], minlength=countries)
    return {
        "world": world,
        "rank": rank,
        "offsets": np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        "gids": gid[named].astype(np.int32),
        "counts": users[named].astype(np.int32),
    }
