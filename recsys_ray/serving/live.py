"""Items that were added, changed or removed since the bundle was built.

The bundle's index is never modified. Beside it are the removed gids, new states of items that stay where they are, and
a small table of new items, which are scored by one product with the user's vector. A change creates a new
:class:`LiveItems`; requests that hold the old one keep it.

An item of the bundle whose title, facts or availability change keeps its vectors, its popularity and its place in the
memory, for they come from its users. What a new text says counts in the next run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from safetensors import SafetensorError
from safetensors.numpy import load, save

from recsys_ray.scoring.memory import NO_RAISERS, MemoryOfNew, Raisers
from recsys_ray.serving.filters import Filters, Mask
from recsys_ray.serving.search import ItemSearch


@dataclass(frozen=True)
class LiveVectors:
    """An item's vectors from the models of one bundle."""

    version: str  # of the bundle
    wide: npt.NDArray[np.float32]  # [d + 1]: [v_j, b_j]
    hgnn: npt.NDArray[np.float32]  # [hgnn_dim]
    raisers: Raisers  # of the bundle's items

    def pack(self) -> bytes:
        version = np.frombuffer(self.version.encode(), np.uint8).copy()
        raising, raised_by = self.raisers
        return save(
            {"version": version, "wide": self.wide, "hgnn": self.hgnn, "raising": raising, "raised_by": raised_by}
        )

    @staticmethod
    def unpack(data: bytes) -> LiveVectors:
        """Raises ValueError: ``data`` are damaged."""
        try:
            found = load(data)
            raisers = (
                Raisers(found["raising"], found["raised_by"]) if "raising" in found else NO_RAISERS
            )  # an old store
            made = LiveVectors(found["version"].tobytes().decode(), found["wide"], found["hgnn"], raisers)
        except (SafetensorError, KeyError, TypeError, ValueError):
            raise ValueError("its vectors cannot be read") from None
        for vector in (made.wide, made.hgnn, raisers.coefficient):
            if vector.dtype != np.float32 or vector.ndim != 1 or not np.isfinite(vector).all():
                raise ValueError("its vectors are not finite float32 numbers")
        gid = raisers.gid
        if gid.dtype != np.int32 or gid.shape != raisers.coefficient.shape or gid.min(initial=0) < 0:
            raise ValueError("what raises it are not items")
        return made


@dataclass(frozen=True)
class LiveItem:
    """A new item, or a new state of one of the bundle's."""

    item_id: str
    ntype: int
    title: str
    language: str | None
    categories: tuple[str, ...]
    published_at: int | None  # unix seconds
    available: bool

    @staticmethod
    def of(item_id: str, ntype: int, record: Mapping[str, Any]) -> LiveItem:
        """``record``: columns of the items table; ``hidden`` items are not available."""
        available = record.get("available", True) is not False and not record.get("hidden")
        return LiveItem(
            item_id,
            ntype,
            record.get("title") or "",
            record.get("language"),
            tuple(record.get("categories") or ()),
            record.get("published_at"),
            available,
        )

    def fits(self, filters: Filters) -> bool:
        mine, date = set(self.categories), self.published_at
        return (
            (not filters.languages or self.language in filters.languages)
            and (not filters.categories_any or bool(mine & set(filters.categories_any)))
            and mine >= set(filters.categories_all)
            and not mine & set(filters.categories_none)
            and (filters.published_after is None or (date is not None and date >= filters.published_after))
            and (filters.published_before is None or (date is not None and date < filters.published_before))
        )


@dataclass(frozen=True, eq=False)
class LiveItems:
    """All of them, after some change. Item ``place`` of the table has gid ``base + place``."""

    base: int  # items of the bundle
    removed: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))  # gids, ascending
    changed: Mapping[int, LiveItem] = field(default_factory=dict)  # gid in the bundle -> its new state
    items: tuple[LiveItem, ...] = ()
    wide: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 1), np.float32))
    hgnn: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 1), np.float32))
    raisers: tuple[Raisers, ...] = ()
    change: int = 0  # number of the last change that is in it

    def find(self, item_id: str) -> int | None:
        """The gid of a new item."""
        place = self._places.get(item_id)
        return None if place is None else self.base + place

    def get(self, gid: int) -> LiveItem | None:
        """The state of a new or a changed item; None: the bundle's still holds."""
        return self.items[gid - self.base] if gid >= self.base else self.changed.get(gid)

    @cached_property
    def memory(self) -> MemoryOfNew:
        """Numbers new items by their place."""
        return MemoryOfNew.of(self.raisers)

    @cached_property
    def barred(self) -> npt.NDArray[np.int64]:
        """Gids of the bundle that must not come, ascending."""
        hidden = [gid for gid, item in self.changed.items() if not item.available]
        return np.union1d(self.removed, np.array(hidden, np.int64))

    @cached_property
    def stale(self) -> npt.NDArray[np.int64]:
        """Gids of the bundle whose words are no longer the bundle's, ascending."""
        return np.union1d(self.removed, np.fromiter(self.changed, np.int64, len(self.changed)))

    def search(self, text: str, limit: int) -> list[LiveItem]:
        """New and changed items that have the words of ``text``; see :class:`ItemSearch`."""
        items, search = self._search
        return [items[place] for place in search.find(text, limit, np.empty(0, np.int64))]

    @cached_property
    def _search(self) -> tuple[list[LiveItem], ItemSearch]:
        """The newest first."""
        items = [*self.changed.values(), *self.items]
        ids, titles = (pa.array([getattr(item, of) for item in items], pa.string()) for of in ("item_id", "title"))
        return items, ItemSearch(ids, titles, np.arange(len(items))[::-1])

    def allowed(self, mask: Mask, filters: Filters) -> Mask:
        """Which of the bundle's items ``filters`` allow, given those that they allow by the bundle's facts."""
        if not self.changed:
            return mask
        mask = mask.copy()
        for gid, item in self.changed.items():
            mask[gid] = item.fits(filters)
        return mask

    def after(
        self,
        change: int,
        gone: Sequence[tuple[str, int | None]],
        changed: Sequence[tuple[LiveItem, int]],
        new: Sequence[tuple[LiveItem, LiveVectors, int | None]],
    ) -> LiveItems:
        """With further changes.

        Args:
            change: number of the last one.
            gone: removed ids, with their gids in the bundle if they have one.
            changed: new states of the bundle's items that stay where they are, with their gids.
            new: new items with their vectors, likewise; they replace the bundle's.
        """
        old = zip(self.items, self.wide, self.hgnn, self.raisers, strict=True)
        kept = {item.item_id: (item, *vectors) for item, *vectors in old}
        removed, states = set(self.removed.tolist()), dict(self.changed)
        for item_id, gid in [*gone, *((item.item_id, gid) for item, _, gid in new)]:
            kept.pop(item_id, None)
            if gid is not None:
                removed.add(gid)
                states.pop(gid, None)
        for item, gid in changed:
            kept.pop(item.item_id, None)
            removed.discard(gid)
            states[gid] = item
        for item, vectors, _ in new:
            kept[item.item_id] = (item, vectors.wide, vectors.hgnn, vectors.raisers)
        items, wide, hgnn, raisers = zip(*kept.values(), strict=True) if kept else ((), (), (), ())
        none = np.empty((0, 1), np.float32)
        return LiveItems(
            self.base,
            np.array(sorted(removed), np.int64),
            states,
            tuple(items),
            np.stack(wide) if wide else none,
            np.stack(hgnn) if hgnn else none,
            tuple(raisers),
            change,
        )

    def __post_init__(self) -> None:
        object.__setattr__(self, "_places", {item.item_id: place for place, item in enumerate(self.items)})
        object.__setattr__(self, "ntype", np.array([item.ntype for item in self.items], np.int64))

    _places: dict[str, int] = field(init=False, repr=False, compare=False)
    ntype: npt.NDArray[np.int64] = field(init=False, repr=False, compare=False)
