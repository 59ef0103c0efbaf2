"""Fits the co-interaction memory: for each item, a ridge regression on the items nearest to it.

    b_.j = (G + ridge I)^-1 g,    G_ik = users of i and k,  g_i = weight of the pair i -> j,  i and k in N_j

N_j are the items with the largest w_ij / sqrt(users of i), the cosine of the weighted co-interactions but for a factor
of j: by the weight alone, what everybody has would be near to everything. If g_i were the users of i and j and N_j
all other items, b_.j would be EASE^R (Steck, WWW 2019); this is SLIM with the nearest items as selected features (Ning
and Karypis, ICDM 2011), without its L1 term: a system of at most a few hundred unknowns per item instead of one for the
whole catalogue. The weight counts a user less the further i lies before j, and less still if j came first
(recsys_ray/graph/pairs.py), so this is a regression on choosing j soon.

G must be whole. The graph's 30 neighbours of an item are too few: where users have a hundred events, a pair of popular
items is not among them although thousands share it, and counting it as 0 ruins every coefficient. So the graph stage
keeps more pairs (recsys_ray/graph/edges.py). Where even these are not all, G may have negative eigenvalues;
coefficients that would grow without bound under a small ridge are clipped to -1 and 1.

One task per range of items solves the systems.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.linalg.lapack as lapack
from jaxtyping import Float, Int

from recsys_ray.cluster.pool import in_parallel
from recsys_ray.core.offsets import spread
from recsys_ray.core.progress import Progress
from recsys_ray.graph.edges import PAIRS, Edges, read_edges
from recsys_ray.graph.texts import NearestTexts, load_nearest_texts, text_pairs
from recsys_ray.graph.users import load_users
from recsys_ray.scoring.memory import RIDGES, Memory, memory_file

_RANGES = 8  # of items, whose systems are solved by one task each
_UNKNOWNS = 200  # of a system, over all item types; of each type at least
_OF_A_TYPE = 30


class Solved(NamedTuple):
    """Coefficients of src in the regressions of dst; sorted by dst, src."""

    src: Int[np.ndarray, "n"]
    dst: Int[np.ndarray, "n"]
    b: Float[np.ndarray, "n ridges"]


def fit_memories(
    ntype: Int[np.ndarray, "items"], graph: Path, snapshots: Sequence[str], out: Path, progress: Progress
) -> None:
    """Write the memory of each snapshot (:func:`memory_file`); those that are there are kept.

    Args:
        graph: the graph stage's folder.
    """
    import ray

    todo = [snapshot for snapshot in snapshots if not memory_file(out, snapshot).exists()]
    near, users_of = load_nearest_texts(graph), load_users(graph)
    with progress.task("memory", len(todo) * _RANGES, "ranges of items") as task:
        for snapshot in todo:
            users = users_of[snapshot]
            pairs = read_edges(graph / PAIRS / f"{snapshot}.parquet")
            shared, parts = [ray.put(part) for part in (pairs, users, ntype)], []
            for part in in_parallel(
                [(solve, *shared, *items) for items in _ranges(pairs.dst, len(ntype))], ordered=True
            ):
                parts.append(part)
                task.advance()
            memory_of(parts, near, users, ntype).save(memory_file(out, snapshot))


def memory_of(
    parts: Sequence[Solved], near: NearestTexts, users: Int[np.ndarray, "items"], ntype: Int[np.ndarray, "items"]
) -> Memory:
    """``parts``: of all items, as is ``near``."""
    src, dst, b = (np.concatenate(column) for column in zip(*parts, strict=True))
    texts = text_pairs(near, users, np.arange(len(users)))
    return Memory.of_edges(src, dst, b, users, ntype).with_texts(texts, ntype)


def _ranges(dst: Int[np.ndarray, "n"], items: int) -> list[tuple[int, int]]:
    """Ranges of items with about as many pairs; ``dst`` ascends."""
    bounds = [int(dst[len(dst) * k // _RANGES]) if len(dst) else 0 for k in range(1, _RANGES)]
    return list(zip([0, *bounds], [*bounds, items], strict=True))


def nearest(pairs: Edges, users: Int[np.ndarray, "items"], ntype: Int[np.ndarray, "items"]) -> Int[np.ndarray, "kept"]:
    """Places, ascending, of the pairs whose src is in N_dst."""
    types = int(ntype.max(initial=0)) + 1
    group = pairs.dst.astype(np.int64) * types + ntype[pairs.src]
    near = pairs.weight / np.sqrt(np.maximum(users[pairs.src], 1))
    order = np.lexsort((pairs.src, -near, group))
    group = group[order]
    place = np.arange(len(group)) - np.searchsorted(group, group)
    return np.sort(order[place < max(_OF_A_TYPE, _UNKNOWNS // types)])


def solve(
    pairs: Edges, users: Int[np.ndarray, "items"], ntype: Int[np.ndarray, "items"], first: int, last: int
) -> Solved:
    """b of the items ``first <= dst < last`` with each of ``RIDGES``.

    Args:
        pairs: of all items, in both directions, sorted by dst, src.
        users: of each item.
    """
    begin = np.searchsorted(pairs.dst, np.arange(len(users) + 1))
    mine = slice(begin[first], begin[last])
    kept = mine.start + nearest(Edges(*(column[mine] for column in pairs)), users, ntype)
    src, dst = pairs.src[kept], pairs.dst[kept]
    b, place = np.zeros((len(kept), len(RIDGES)), np.float32), np.full(len(users), -1)
    bounds = np.searchsorted(dst, np.arange(first, last + 1))
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        if start == stop:
            continue
        near = src[start:stop]
        place[near] = np.arange(len(near))
        lengths = begin[near + 1] - begin[near]
        shared = spread(begin[near], lengths)  # the pairs of what is near: which of them are with each other?
        column, row = place[pairs.src[shared]], np.repeat(np.arange(len(near)), lengths)
        inside = column >= 0
        gram = np.zeros((len(near), len(near)))
        row, column, support = row[inside], column[inside], pairs.support[shared[inside]]
        gram[row, column] = gram[column, row] = support  # either may be kept without the other
        b[start:stop] = _solutions(gram, users[near], pairs.weight[kept[start:stop]].astype(np.float64))
        place[near] = -1
    return Solved(src, dst, b)


def _solutions(
    gram: Float[np.ndarray, "n n"], users: Int[np.ndarray, "n"], right: Float[np.ndarray, "n"]
) -> Float[np.ndarray, "n ridges"]:
    diagonal, found = np.diag_indices(len(gram)), np.empty((len(gram), len(RIDGES)))
    for column, ridge in enumerate(RIDGES):
        gram[diagonal] = users + ridge
        _, found[:, column], failed = lapack.dposv(gram, right)
        if failed:  # not positive definite, since pairs are missing
            found[:, column] = np.linalg.lstsq(gram, right, rcond=None)[0]
    return np.clip(found, -1, 1)
