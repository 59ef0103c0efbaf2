"""The items with the nearest texts: which items an item that few users had would be taken with.

Of a new item nobody knows the co-interactions, and of a thin one few are known by chance. What the text of an item j
tells is taken as users in addition to the n_j who had it: of item i, which is one of the ``ALIKE`` items with the
nearest texts, c t_ij users (ours, not the papers')

    t_ij = (1 + NEW / (1 + n_j)) max(cos(x_i, x_j), 0)^SHARPNESS / sum over i of max(cos(x_i, x_j), 0)^SHARPNESS

The sum over i is c for an item that thousands had, which keeps what they tell, and (1 + NEW) c for one that nobody had,
since its users are still to come. A text says nothing that as many other items have, such as a default title.

The graph takes them into its edges (recsys_ray/graph/edges.py), the co-interaction memory into its coefficients
(recsys_ray/scoring/memory.py). Imports neither ray nor dgl nor transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import faiss
import numpy as np
from jaxtyping import Float, Int

from recsys_ray.storage.artifacts import load_arrays

TEXTS = "texts.safetensors"  # of the graph stage
ALIKE = 10  # nearest items that a text's users come from
SHARPNESS = 8  # the larger, the more of them come from the very nearest
NEW = 3  # how many times as many users a text stands for, in addition, where nobody had the item
_FOUND = 30  # nearest items that are looked for: at an earlier snapshot some of them had no users yet
_SAME = 0.9999  # cosine of texts that are the same but for rounding
_EXACT = 1 << 34  # comparisons of two texts at most; beyond, texts are compared within the nearest of many cells
_CELLS = 4  # times the root of the number of texts
_LOOKED_AT = 16  # cells
_BLOCK = 4096  # texts that are looked for at once
_READ = 1 << 16  # texts that they are compared with at once


class NearestTexts(NamedTuple):
    """Of each item the items with the nearest texts, nearest first, not itself; -1 where there are fewer."""

    gid: Int[np.ndarray, "items found"]  # int32
    cosine: Float[np.ndarray, "items found"]  # float32


class TextPairs(NamedTuple):
    """The users that texts stand for: of the item src, counted as users of dst, too."""

    src: Int[np.ndarray, "n"]
    dst: Int[np.ndarray, "n"]
    users: Float[np.ndarray, "n"]  # float32: t


def nearest_texts(
    text: Float[np.ndarray, "items dim"],
    known: Int[np.ndarray, "k"],
    wanted: Float[np.ndarray, "n dim"],
    own: Int[np.ndarray, "n"],
    threads: int,
) -> NearestTexts:
    """The nearest texts among those of the items ``known``.

    Args:
        text: of all items, unit vectors, float16; may be a memory map.
        known: gids, ascending: of the items that somebody had.
        wanted: texts whose neighbours are looked for, float16.
        own: their gids, which are not their own neighbours; -1: not in ``text``.
    """
    found = min(_FOUND + 1, len(known))
    gids = np.full((len(wanted), _FOUND), -1, np.int32)
    cosines = np.zeros((len(wanted), _FOUND), np.float32)
    if not found:
        return NearestTexts(gids, cosines)
    faiss.omp_set_num_threads(threads)
    index = _cells(text[known].astype(np.float32)) if len(known) * len(wanted) > _EXACT else None
    for begin in range(0, len(wanted), _BLOCK):
        block, mine = wanted[begin : begin + _BLOCK].astype(np.float32), own[begin : begin + _BLOCK, None]
        cosine, place = index.search(block, found) if index else _exact(text, known, block, found)
        gid = np.where(place >= 0, known[place], -1)
        # without the item itself, which has the nearest text where it is among them
        last = np.argsort(gid == mine, axis=1, kind="stable")[:, :_FOUND]
        gid, cosine = (np.take_along_axis(part, last, 1) for part in (gid, cosine))
        gid[gid == mine] = -1
        gids[begin : begin + len(block), : gid.shape[1]] = gid
        cosines[begin : begin + len(block), : gid.shape[1]] = cosine
    return NearestTexts(gids, cosines)


def _exact(
    text: Float[np.ndarray, "items dim"], known: Int[np.ndarray, "k"], wanted: Float[np.ndarray, "n dim"], found: int
) -> tuple[Float[np.ndarray, "n found"], Int[np.ndarray, "n found"]]:
    """Cosines and places in ``known``; reads a part of the texts at a time."""
    cosine, place = np.zeros((len(wanted), 0), np.float32), np.zeros((len(wanted), 0), np.int64)
    for begin in range(0, len(known), _READ):
        some = text[known[begin : begin + _READ]].astype(np.float32)
        near, at = faiss.knn(wanted, some, min(found, len(some)), metric=faiss.METRIC_INNER_PRODUCT)
        cosine, place = np.concatenate([cosine, near], 1), np.concatenate([place, at + begin], 1)
        best = np.argsort(-cosine, axis=1, kind="stable")[:, :found]
        cosine, place = np.take_along_axis(cosine, best, 1), np.take_along_axis(place, best, 1)
    return cosine, place


def _cells(text: Float[np.ndarray, "known dim"]) -> faiss.Index:
    cells = int(_CELLS * len(text) ** 0.5)
    index = faiss.index_factory(text.shape[1], f"IVF{cells},SQfp16", faiss.METRIC_INNER_PRODUCT)
    index.train(text)
    faiss.extract_index_ivf(index).nprobe = _LOOKED_AT
    index.add(text)
    return index


def load_nearest_texts(graph: Path) -> NearestTexts:
    """Of every item; ``graph``: the graph stage's folder."""
    return NearestTexts(**load_arrays(graph / TEXTS))


def text_pairs(near: NearestTexts, users: Int[np.ndarray, "items"], wanted: Int[np.ndarray, "n"]) -> TextPairs:
    """t of the items ``wanted``, whose rows ``near`` has, by the users of each item at a snapshot."""
    there = (near.gid >= 0) & (users[near.gid] > 0)
    there &= there.cumsum(1) <= ALIKE
    there &= near.cosine[:, ALIKE - 1, None] < _SAME
    told = np.where(there, np.maximum(near.cosine, 0) ** SHARPNESS, 0)
    told *= (1 + NEW / (1 + users[wanted]))[:, None] / np.maximum(told.sum(1), np.finfo(np.float32).tiny)[:, None]
    row, column = np.nonzero(told)
    return TextPairs(near.gid[row, column].astype(np.int64), wanted[row], told[row, column].astype(np.float32))
