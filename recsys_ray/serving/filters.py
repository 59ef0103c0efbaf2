"""Which items a request allows, by language, category, availability and publication date.

The bundle has the gids of each language and category. A filter is a mask over the catalogue, made from these lists once
and cached, because applications repeat the same filters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recsys_ray.core.clock import NEVER
from recsys_ray.core.offsets import offsets_of
from recsys_ray.serving.histories import mapped_arrays
from recsys_ray.storage.artifacts import read_json, save_arrays, write_json

FACTS, NAMES = "facts.safetensors", "facts.json"
_KEPT = 64  # filters whose masks are remembered: a byte for each item of the catalogue

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Filters:
    """Conditions on an item. An empty field imposes none; all given fields must hold."""

    languages: tuple[str, ...] = ()  # one of these
    categories_any: tuple[str, ...] = ()
    categories_all: tuple[str, ...] = ()
    categories_none: tuple[str, ...] = ()
    published_after: int | None = None  # unix seconds; an item without a date is left out
    published_before: int | None = None

    def __bool__(self) -> bool:
        return self != Filters()


class Facts:
    """Languages, categories and dates of a bundle's items."""

    def __init__(self, folder: Path) -> None:
        arrays = {name: tensor.numpy() for name, tensor in mapped_arrays(folder / FACTS).items()}
        names = read_json(folder / NAMES)
        self.published = arrays["published"]
        self._places = {kind: {name: place for place, name in enumerate(names[kind])} for kind in names}
        self._lists = {kind: (arrays[f"{kind}_begin"], arrays[f"{kind}_gid"]) for kind in names}
        self.allowed = lru_cache(maxsize=_KEPT)(self._allowed)

    def names(self, kind: str) -> list[str]:
        """Of all languages or categories; ``kind``: ``language`` or ``category``."""
        return list(self._places[kind])

    def common(self, kind: str, most: int) -> dict[str, int]:
        """Up to ``most`` languages or categories with their numbers of items, most items first."""
        begin, _ = self._lists[kind]
        names, counts = self.names(kind), np.diff(begin)
        return {names[place]: int(counts[place]) for place in np.argsort(-counts, kind="stable")[:most]}

    def of(self, gid: int) -> tuple[str | None, list[str], int | None]:
        """Language, categories and date of publication of an item; it looks through all lists for them."""
        found = {}
        for kind, (begin, gids) in self._lists.items():
            places = np.searchsorted(begin, np.flatnonzero(gids == gid), side="right") - 1
            names = list(self._places[kind])
            found[kind] = [names[place] for place in places]
        date = int(self.published[gid])
        return next(iter(found["language"]), None), found["category"], None if date == NEVER else date

    def columns(self) -> tuple[pa.Array, pa.ListArray]:
        """Language (null where unknown) and categories of each item, row = gid."""
        begin, gids = self._lists["language"]
        code = np.full(len(self.published), -1)
        code[gids] = np.repeat(np.arange(len(begin) - 1), np.diff(begin))
        language = pa.array(self.names("language"), pa.string()).take(pa.array(code, mask=code < 0))
        begin, gids = self._lists["category"]
        order = np.argsort(gids, kind="stable")
        codes = np.repeat(np.arange(len(begin) - 1), np.diff(begin))[order]
        offsets = np.searchsorted(gids[order], np.arange(len(self.published) + 1)).astype(np.int32)
        names = pa.array(self.names("category"), pa.string()).take(pa.array(codes))
        return language, pa.ListArray.from_arrays(pa.array(offsets), names)

    def _allowed(self, filters: Filters) -> Mask:
        """bool [items], not to be written to."""
        mask = np.ones(len(self.published), bool)
        if filters.languages:
            mask &= self._any("language", filters.languages)
        if filters.categories_any:
            mask &= self._any("category", filters.categories_any)
        for name in filters.categories_all:
            mask &= self._any("category", (name,))
        if filters.categories_none:
            mask &= ~self._any("category", filters.categories_none)
        if filters.published_after is not None:
            mask &= (self.published >= filters.published_after) & (self.published != NEVER)
        if filters.published_before is not None:
            mask &= self.published < filters.published_before  # NEVER is the largest number
        mask.setflags(write=False)
        return mask

    def _any(self, kind: str, names: Sequence[str]) -> Mask:
        begin, gids = self._lists[kind]
        mask = np.zeros(len(self.published), bool)
        for place in (self._places[kind][name] for name in names if name in self._places[kind]):
            mask[gids[begin[place] : begin[place + 1]]] = True
        return mask


def write_facts(folder: Path, language: pa.Array, categories: pa.Array, published: npt.NDArray[np.int64]) -> None:
    """Write what :class:`Facts` reads. Row = gid; ``categories`` are lists of texts, ``published`` unix seconds or
    ``NEVER``."""
    gid = pa.array(np.arange(len(language)))
    flat = pc.list_flatten(categories)
    pairs = {"language": (language, gid), "category": (flat, pc.list_parent_indices(categories).cast(pa.int64()))}
    arrays: dict[str, npt.NDArray[np.generic]] = {"published": published}
    names = {}
    for kind, (values, owners) in pairs.items():
        coded = values.dictionary_encode()
        coded = coded.combine_chunks() if isinstance(coded, pa.ChunkedArray) else coded
        codes = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        owner = owners.to_numpy()[codes >= 0] if isinstance(owners, pa.Array) else owners
        names[kind] = coded.dictionary.to_pylist()
        unique = np.unique(codes[codes >= 0] * len(language) + owner)
        counts = np.bincount(unique // max(len(language), 1), minlength=len(names[kind]))
        arrays[f"{kind}_begin"] = offsets_of(counts)
        arrays[f"{kind}_gid"] = (unique % max(len(language), 1)).astype(np.int32)
    save_arrays(folder / FACTS, arrays)
    write_json(folder / NAMES, names)
