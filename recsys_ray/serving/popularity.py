"""Popularity: users per item over the window's positives, worldwide and by country."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys_ray.core.clock import NEVER
from recsys_ray.core.offsets import check_offsets, offsets_of
from recsys_ray.data.tables import Events
from recsys_ray.scoring.scorer import among
from recsys_ray.serving.histories import mapped_arrays
from recsys_ray.storage.artifacts import understood

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
        made = cls(**{name: tensor.numpy() for name, tensor in mapped_arrays(path).items()})
        with understood(path):
            check_offsets(made.offsets, len(made.gids))
        return made

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


class PopularLists:
    """Items that may be recommended, most popular first: for each type the world's list, and each country's own items.

    A small country says little, so its counts are added to as many as ``_PRIOR`` of the world's. Made once; an answer
    reads as many places as it needs.
    """

    def __init__(self, popular: Popularity, ntype: npt.NDArray[np.integer], available: npt.NDArray[np.bool_]) -> None:
        self.counted, self._types = popular, int(ntype.max(initial=-1)) + 1
        self._share = popular.world / max(int(popular.world.sum()), 1)
        order = np.argsort(popular.rank, kind="stable")
        order = order[available[order]]
        self._world = [order[ntype[order] == kind] for kind in range(self._types)]
        # A country's items by type, best first; cell c * types + t holds those of country c and type t.
        country = np.repeat(np.arange(len(popular.offsets) - 1), np.diff(popular.offsets))
        total = np.bincount(country, popular.counts, minlength=len(popular.offsets) - 1)
        gids = popular.gids.astype(np.int64)
        score = (self._share[gids] * _PRIOR + popular.counts) / (_PRIOR + total[country])
        kept = np.flatnonzero(available[gids])
        cell = country[kept] * self._types + ntype[gids[kept]]
        kept = kept[np.lexsort((popular.rank[gids[kept]], -score[kept], cell))]
        cell = country[kept] * self._types + ntype[gids[kept]]
        self._begin = np.searchsorted(cell, np.arange((len(popular.offsets) - 1) * self._types + 1))
        self._local, self._local_score, self._total = gids[kept], score[kept], total

    def top(
        self,
        k: int,
        types: Sequence[int],
        forbidden: npt.NDArray[np.int64],
        country: int = -1,
        allowed: npt.NDArray[np.bool_] | None = None,
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Scores and gids of the best ``k`` items of ``types`` that are not ``forbidden`` (ascending gids); and whether
        the country made them. The score is the share of users that an item has.

        Args:
            allowed: bool [items]; None: all.
        """
        far = k + len(forbidden)

        def first(ordered: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | slice:
            """Places of the first ``far`` allowed ones."""
            return slice(far) if allowed is None else np.flatnonzero(allowed[ordered])[:far]

        known = 0 <= country < len(self._total)
        lists = [self._world[kind] for kind in types]
        world = np.concatenate([np.empty(0, np.int64), *(ordered[first(ordered)] for ordered in lists)])
        score = self._share[world] * (_PRIOR / (_PRIOR + self._total[country]) if known else 1.0)
        local = np.empty(0, np.int64)
        if known:  # an item of the country's is taken from its own list, wherever it stands in the world's
            mine = [slice(*self._begin[country * self._types + kind :][:2]) for kind in types]
            own = slice(*self.counted.offsets[country : country + 2])
            others = ~among(world, self.counted.gids[own])
            places = [np.arange(part.start, part.stop)[first(self._local[part])] for part in mine]
            local = np.concatenate([self._local[place] for place in places])
            score = np.concatenate([score[others], *(self._local_score[place] for place in places)])
            world = np.concatenate([world[others], local])
        kept = ~among(world, forbidden)
        world, score = world[kept], score[kept]
        best = np.lexsort((self.counted.rank[world], -score))[:k]
        return score[best], world[best], np.isin(world[best], local)


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
        "offsets": offsets_of(sizes),
        "gids": gid[named].astype(np.int32),
        "counts": users[named].astype(np.int32),
    }
