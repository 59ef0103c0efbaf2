"""Finds items by the words of their titles and ids, as they are typed.

An inverted index of the words, made once: the words in order, and for each the items that have it. The words that begin
with what was typed are neighbours there, and so are their items. A query costs a mask over the catalogue for each of
its words, never a comparison of titles.
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

_WORDS = 8  # of a query; further ones are not looked at
_LAST = "\U0010ffff"  # sorts after every other character


class ItemSearch:
    """Items are numbered as in ``ids`` and ``titles``.

    Args:
        order: all items, those first that are to be found first.
    """

    def __init__(self, ids: pa.Array, titles: pa.Array, order: npt.NDArray[np.integer]) -> None:
        self._order = order.astype(np.int64)
        self._place = np.empty(len(order), np.int32)
        self._place[self._order] = np.arange(len(order), dtype=np.int32)
        space = pa.scalar(" ", pa.large_string())
        texts = pc.binary_join_element_wise(titles.cast(pa.large_string()), ids.cast(pa.large_string()), space)
        words = _split(texts)
        coded = pc.list_flatten(words).dictionary_encode()
        owners = self._place[pc.list_parent_indices(words).to_numpy()]
        ascending = pc.sort_indices(coded.dictionary)
        self._words = coded.dictionary.take(ascending)
        number = np.empty(len(self._words), np.int64)
        number[ascending.to_numpy()] = np.arange(len(self._words))
        codes = number[coded.indices.to_numpy()]
        self._counts = np.bincount(codes, minlength=len(self._words))
        self._begin = np.concatenate([[0], np.cumsum(self._counts)])
        self._owners = owners[np.argsort(codes, kind="stable")]

    def find(self, text: str, limit: int, barred: npt.NDArray[np.integer]) -> list[int]:
        """Items in which every word of ``text`` begins a word; if there are none, those in which it is part of one.

        Args:
            barred: items that must not come.
        """
        (listed,) = _split(pa.array([text], pa.large_string())).to_pylist()
        wanted = [word for word in listed if word][:_WORDS]
        if not wanted:
            return []
        found = self._all(map(self._beginning, wanted), barred)
        if not len(found):
            found = self._all(map(self._containing, wanted), barred)
        return self._order[found[:limit]].tolist()

    def _all(self, lists: map[npt.NDArray[np.int32]], barred: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """Places that are in every list, first to last."""
        kept = np.ones(len(self._order), bool)
        kept[self._place[barred]] = False
        for places in lists:
            mask = np.zeros(len(kept), bool)
            mask[places] = True
            kept &= mask
        return np.flatnonzero(kept)

    def _beginning(self, word: str) -> npt.NDArray[np.int32]:
        low = bisect_left(self._words, word, key=_text)
        high = bisect_left(self._words, word + _LAST, low, key=_text)
        return self._owners[self._begin[low] : self._begin[high]]

    def _containing(self, word: str) -> npt.NDArray[np.int32]:
        hit = pc.match_substring(self._words, word).to_numpy(zero_copy_only=False)
        return self._owners[np.repeat(hit, self._counts)]


def _text(value: pa.Scalar) -> str:
    return value.as_py()  # type: ignore[no-any-return]


def _split(texts: pa.Array) -> pa.Array:
    """The words of each text, in small letters and without accents."""
    if not pc.all(pc.string_is_ascii(texts)).as_py():
        texts = pc.replace_substring_regex(pc.utf8_normalize(texts, "NFKD"), r"\p{Mn}+", "")
    return pc.ascii_split_whitespace(pc.replace_substring_regex(pc.utf8_lower(texts), "[!-/:-@\\[-`{-~]+", " "))
