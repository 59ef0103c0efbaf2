"""Items that were added, changed or removed since the bundle was built.

The bundle's index is never modified. Beside it are the removed gids and a small table of new items, which are scored by
one product with the user's vector. A change creates a new :class:`LiveItems`; requests that hold the old one keep it.
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

from recsys_ray.serving.filters import Filters
from recsys_ray.serving.search import ItemSearch


@dataclass(frozen=True)
class LiveVectors:
    """An item's vectors from the models of one bundle."""

    version: str  # of the bundle
    wide: npt.NDArray[np.float32]  # [d + 1]: [v_j, b_j]
    hgnn: npt.NDArray[np.float32]  # [hgnn_dim]

    def pack(self) -> bytes:
        version = np.frombuffer(self.version.encode(), np.uint8)
        return save({"version": version.copy(), "wide": self.wide, "hgnn": self.hgnn})

    @staticmethod
    def unpack(data: bytes) -> LiveVectors:
        """Raises ValueError: ``data`` are damaged."""
        try:
            found = load(data)
            made = LiveVectors(found["version"].tobytes().decode(), found["wide"], found["hgnn"])
        except (SafetensorError, KeyError, TypeError, ValueError):
            raise ValueError("its vectors cannot be read") from None
        for vector in (made.wide, made.hgnn):
            if vector.dtype != np.float32 or vector.ndim != 1 or not np.isfinite(vector).all():
                raise ValueError("its vectors are not finite float32 numbers")
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


@dataclass(frozen=True)
class LiveItems:
    """All of them, after some change. Item ``place`` of the table has gid ``base + place``."""

    base: int  # items of the bundle
    removed: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))  # gids, ascending
    items: tuple[LiveItem, ...] = ()
    wide: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 1), np.float32))
    hgnn: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 1), np.float32))
    change: int = 0  # number of the last change that is in it

    def find(self, item_id: str) -> int | None:
        """The gid of a new item."""
        place = self._places.get(item_id)
        return None if place is None else self.base + place

    def get(self, gid: int) -> LiveItem:
        return self.items[gid - self.base]

    @cached_property
    def search(self) -> ItemSearch:
        """The newest first; numbers are places in the table."""
        ids = pa.array([item.item_id for item in self.items], pa.string())
        titles = pa.array([item.title for item in self.items], pa.string())
        return ItemSearch(ids, titles, np.arange(len(self.items))[::-1])

    def after(
        self,
        change: int,
        gone: Sequence[tuple[str, int | None]],
        new: Sequence[tuple[LiveItem, LiveVectors, int | None]],
    ) -> LiveItems:
        """With further changes.

        Args:
            change: number of the last one.
            gone: removed ids, with their gids in the bundle if they have one.
            new: new items with their vectors, likewise; they replace the bundle's.
        """
        kept = {item.item_id: (item, self.wide[place], self.hgnn[place]) for place, item in enumerate(self.items)}
        removed = {int(gid) for gid in self.removed}
        for item_id, gid in gone:
            kept.pop(item_id, None)
            removed |= {gid} if gid is not None else set()
        for item, vectors, gid in new:
            kept[item.item_id] = (item, vectors.wide, vectors.hgnn)
            removed |= {gid} if gid is not None else set()
        items, wide, hgnn = zip(*kept.values(), strict=True) if kept else ((), (), ())
        none = np.empty((0, 1), np.float32)
        return LiveItems(
            self.base,
            np.array(sorted(removed), np.int64),
            tuple(items),
            np.stack(wide) if wide else none,
            np.stack(hgnn) if hgnn else none,
            change,
        )

    def __post_init__(self) -> None:
        object.__setattr__(self, "_places", {item.item_id: place for place, item in enumerate(self.items)})
        object.__setattr__(self, "ntype", np.array([item.ntype for item in self.items], np.int64))

    _places: dict[str, int] = field(init=False, repr=False, compare=False)
    ntype: npt.NDArray[np.int64] = field(init=False, repr=False, compare=False)
