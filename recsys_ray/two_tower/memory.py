"""Direct memory beside the towers: what users who had an item of the history chose as well.

Two vectors of 128 numbers generalise; they cannot hold every pair of items that belong together. The co-interaction
graph has these pairs, so its edges are also used as they are, like the wide part beside a deep one (Cheng et al., Wide
& Deep Learning for Recommender Systems, DLRS 2016; ours, not the papers'):

    score(u, j) = <u, v_j> + w * log(1 + m_uj / SMALL),    m_uj = sum over i in history of u of a_ui * s_ij
    s_ij = c_ij / (d_i^OWN * d_j^OTHER),    a_ui proportional to 2^(-places back / HALF_LIFE), their sum 1

``c_ij`` are the users that share an edge's items, ``d`` the sum of ``c`` over an item's edges. The weight w is chosen
on the validation period (recsys_ray/two_tower/training.py); 0 leaves the towers alone. Lists still come from the ANN
search: an item without an edge to the history has its inner product as its score, so that the best by inner product and
the history's neighbours hold the exact list (recsys_ray/retrieval/recommender.py).

Imports neither dgl nor transformers: it is used in a serving replica.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from recsys_ray.artifacts import load_arrays, save_arrays

OWN, OTHER = 0.5, 0.3
HALF_LIFE = 2.0
NEIGHBOURS = 100  # of an item that are remembered, in each item type: the most similar
SMALL = 1e-3
WEIGHTS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0)  # of the temperature, which a validation chooses from


@dataclass(frozen=True)
class Memory:
    """Similar items of each item, row = gid; arrays may be memory maps."""

    begin: Int[np.ndarray, "items_plus_1"]
    gid: Int[np.ndarray, "edges"]  # int32, ascending in each row
    similarity: Float[np.ndarray, "edges"]  # float32
    degree: Float[np.ndarray, "items"]  # float32

    @staticmethod
    def of_edges(path: Path, ntype: Int[np.ndarray, "items"]) -> Memory:
        """From a snapshot's edges (graph/edges/<snapshot>.parquet)."""
        table = pq.read_table(path, columns=["src", "dst", "support"])
        src, dst, support = (table[name].to_numpy() for name in table.column_names)
        return _EMPTY.extended(src, dst, support, np.arange(len(ntype)), ntype)

    def extended(
        self,
        src: Int[np.ndarray, "n"],
        dst: Int[np.ndarray, "n"],
        support: Int[np.ndarray, "n"],
        anew: Int[np.ndarray, "m"],
        ntype: Int[np.ndarray, "items"],
    ) -> Memory:
        """With these edges of the items ``anew`` in the place of those that they have here.

        An edge that was kept in one direction only counts in both. ``ntype`` is that of all items.
        """
        items = len(ntype)
        key = np.concatenate([src.astype(np.int64) * items + dst, dst.astype(np.int64) * items + src])
        key, first = np.unique(key, return_index=True)
        support = support[first % max(len(support), 1)].astype(np.float64)
        row, gid = key // items, key % items
        fresh = np.zeros(items, bool)
        fresh[anew] = True
        degree = np.zeros(items)
        degree[: len(self.degree)] = self.degree
        degree[fresh] = 0
        degree = np.maximum(degree, np.bincount(row, support, minlength=items))
        similarity = (support / (degree[row] ** OWN * degree[gid] ** OTHER)).astype(np.float32)
        old_row = np.repeat(np.arange(len(self.degree)), np.diff(self.begin))
        kept = ~fresh[old_row] & ~fresh[self.gid]
        row, gid = np.concatenate([old_row[kept], row]), np.concatenate([self.gid[kept], gid])
        similarity = np.concatenate([self.similarity[kept], similarity])
        best = _most_similar(row, gid, similarity, ntype)
        row, gid, similarity = row[best], gid[best], similarity[best]
        begin = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=items))])
        return Memory(begin.astype(np.int64), gid.astype(np.int32), similarity, degree.astype(np.float32))

    @staticmethod
    def load(path: Path) -> Memory:
        return Memory(**load_arrays(path))

    def save(self, path: Path) -> None:
        save_arrays(path, vars(self))

    def recall(
        self, user: Int[np.ndarray, "n"], gid: Int[np.ndarray, "n"]
    ) -> tuple[Int[np.ndarray, "m"], Int[np.ndarray, "m"], Float[np.ndarray, "m"]]:
        """What histories bring to mind.

        Args:
            user, gid: the events of all histories; of each user in one piece, oldest first.

        Returns:
            user, gid and log(1 + m / SMALL) (float32) of every pair with m > 0, ascending by user and gid.
        """
        items = len(self.begin) - 1
        user, gid, weight = _latest(user.astype(np.int64), gid.astype(np.int64), items)
        start, count = self.begin[gid], self.begin[gid + 1] - self.begin[gid]
        place = np.repeat(start - (np.cumsum(count) - count), count) + np.arange(int(count.sum()))
        key = np.repeat(user, count) * items + self.gid[place]
        key, where = np.unique(key, return_inverse=True)
        total = np.bincount(where, self.similarity[place] * np.repeat(weight, count), minlength=len(key))
        return key // max(items, 1), key % max(items, 1), np.log1p(total / SMALL).astype(np.float32)


def memory_file(two_tower: Path, snapshot: str) -> Path:
    """Where the two-tower stage keeps the memory of a snapshot, for both of its variants."""
    return two_tower / "memory" / f"{snapshot}.safetensors"


_EMPTY = Memory(np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.float32))


def _most_similar(row: np.ndarray, gid: np.ndarray, similarity: np.ndarray, ntype: np.ndarray) -> np.ndarray:
    """Places of the ``NEIGHBOURS`` most similar of each row and item type, by row and gid. Whoever is in everybody's
    list has a list as long as the catalogue, and an answer may not take that long."""
    group = row * (int(ntype.max(initial=0)) + 1) + ntype[gid]
    order = np.lexsort((gid, -similarity, group))
    group = group[order]
    kept = order[np.arange(len(group)) - np.searchsorted(group, group) < NEIGHBOURS]
    return kept[np.lexsort((gid[kept], row[kept]))]


def _latest(user: np.ndarray, gid: np.ndarray, items: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each user's distinct items with their weights a, by the last time that they occur."""
    backwards = (user * items + gid)[::-1]
    last = np.sort(len(user) - 1 - np.unique(backwards, return_index=True)[1])
    user, gid = user[last], gid[last]
    back = np.searchsorted(user, user, side="right") - np.arange(len(user)) - 1
    weight = 0.5 ** (back / HALF_LIFE)
    sums = np.bincount(user, weight, minlength=1) if len(user) else np.ones(1)
    return user, gid, weight / sums[user]
