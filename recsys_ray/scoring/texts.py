"""The items with the nearest texts: which items an item that few users had would be taken with.

Of a new item nobody knows the co-interactions, and of a thin one few are known by chance. What the text of an item j
tells is taken as users in addition to the n_j who had it (recsys_ray/scoring/memory.py): of item i, which is one of the
``ALIKE`` items with the nearest texts, c t_ij users (ours, not the papers')

    t_ij = (1 + NEW / (1 + n_j)) max(cos(x_i, x_j), 0)^SHARPNESS / sum over i of max(cos(x_i, x_j), 0)^SHARPNESS

The sum over i is c for an item that thousands had, which keeps what they tell, and (1 + NEW) c for one that nobody had,
since its users are still to come. A text says nothing that as many other items have, such as a default title.

Imports neither dgl nor transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import faiss
import numpy as np
from jaxtyping import Bool, Float, Int

from recsys_ray.storage.artifacts import load_arrays

ALIKE = 10  # nearest items that a text's users come from
SHARPNESS = 8  # the larger, the more of them come from the very nearest
NEW = 3  # how many times as many users a text stands for, in addition, where nobody had the item
_FOUND = 30  # nearest items that are looked for: at an earlier snapshot some of them had no users yet
_SAME = 0.9999  # cosine of texts that are the same but for rounding
_EXACT = 1 << 34  # comparisons of two texts at most; beyond, texts are compared within the nearest of many cells
_CELLS = 4  # times the root of the number of texts
_LOOKED_AT = 16  # cells
_BLOCK = 4096  # texts that are looked for at once


class NearestTexts(NamedTuple):
    """Of each item the items with the nearest texts, nearest first, not itself; -1 where there are fewer."""

    gid: Int[np.ndarray, "items found"]  # int32
    cosine: Float[np.ndarray, "items found"]  # float32


class TextPairs(NamedTuple):
    """The users that texts stand for: of the item src, counted as users of dst, too."""

    src: Int[np.ndarray, "n"]
    dst: Int[np.ndarray, "n"]
    users: Float[np.ndarray, "n"]  # float32: t

    @staticmethod
    def nothing() -> TextPairs:
        none = np.zeros(0, np.int64)
        return TextPairs(none, none, np.zeros(0, np.float32))


def nearest_texts(
    text: Float[np.ndarray, "items dim"],
    had: Bool[np.ndarray, "items"],
    wanted: Int[np.ndarray, "n"],
    threads: int,
) -> NearestTexts:
    """The nearest texts among those of items that somebody had, for the items ``wanted``.

    Args:
        text: of all items, unit vectors, float16.
    """
    known = np.flatnonzero(had)
    gids = np.full((len(wanted), _FOUND), -1, np.int32)
    cosines = np.zeros((len(wanted), _FOUND), np.float32)
    if not len(known):
        return NearestTexts(gids, cosines)
    faiss.omp_set_num_threads(threads)
    index = _index_of(text[known].astype(np.float32), len(wanted))
    for begin in range(0, len(wanted), _BLOCK):
        block = wanted[begin : begin + _BLOCK]
        cosine, place = index.search(text[block].astype(np.float32), min(_FOUND + 1, len(known)))
        found = np.where(place >= 0, known[place], -1)
        # without the item itself, which has the nearest text where it is among them
        last = np.argsort(found == block[:, None], axis=1, kind="stable")[:, :_FOUND]
        found, cosine = (np.take_along_axis(part, last, 1) for part in (found, cosine))
        found[found == block[:, None]] = -1
        gids[begin : begin + len(block), : found.shape[1]] = found
        cosines[begin : begin + len(block), : found.shape[1]] = cosine
    return NearestTexts(gids, cosines)


def nearest_texts_of_all(file: Path, had: Bool[np.ndarray, "items"], threads: int) -> NearestTexts:
    """:func:`nearest_texts` of every item, in a task. ``file``: the featurize stage's."""
    text = load_arrays(file)["vector"]
    return nearest_texts(text, had, np.arange(len(text)), threads)


def _index_of(text: Float[np.ndarray, "known dim"], wanted: int) -> faiss.Index:
    if len(text) * wanted <= _EXACT:
        index: faiss.Index = faiss.IndexFlatIP(text.shape[1])
    else:
        cells = int(_CELLS * len(text) ** 0.5)
        index = faiss.index_factory(text.shape[1], f"IVF{cells},SQfp16", faiss.METRIC_INNER_PRODUCT)
        index.train(text)
        faiss.extract_index_ivf(index).nprobe = _LOOKED_AT
    index.add(text)
    return index


def text_pairs(near: NearestTexts, users: Int[np.ndarray, "items"], wanted: Int[np.ndarray, "n"]) -> TextPairs:
    """t of the items ``wanted``, whose rows ``near`` has, by the users of each item at a snapshot."""
    there = (near.gid >= 0) & (users[near.gid] > 0)
    there &= there.cumsum(1) <= ALIKE
    there &= near.cosine[:, ALIKE - 1, None] < _SAME
    told = np.where(there, np.maximum(near.cosine, 0) ** SHARPNESS, 0)
    told *= (1 + NEW / (1 + users[wanted]))[:, None] / np.maximum(told.sum(1), np.finfo(np.float32).tiny)[:, None]
    row, column = np.nonzero(told)
    return TextPairs(near.gid[row, column].astype(np.int64), wanted[row], told[row, column].astype(np.float32))
